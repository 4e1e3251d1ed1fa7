"""The Hugging Face callback under a real Trainer."""

import copy
import gc
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from repflow.callbacks import RepresentationMonitorCallback
from repflow.monitor import MonitorConfig, RepflowWarning, open_run
from repflow.monitor.sinks import RunFileSink
from tests.callbacks.watching import Keep, hooks

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


class Model(transformers.GPTNeoXForCausalLM):
    """GPT-NeoX with dropout. `fail_at`: number of the training forward that raises, once."""

    fail_at: int | None = None
    fault: type[BaseException] = ZeroDivisionError
    forwards = 0

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or transformers.GPTNeoXConfig(**SIZES, hidden_dropout=0.1))

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if self.training:
            self.forwards += 1
            if self.forwards == self.fail_at:
                raise self.fault("CUDA out of memory." if self.fault is RuntimeError else "in the user's model")
        return output


def rows(number: int = 24) -> list[dict[str, Tensor]]:
    """Sequences of ten tokens, of which the last two are padding."""
    ids = torch.randint(0, 64, (number, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(10, dtype=torch.long)
    mask[8:] = 0
    return [{"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)} for row in ids]


def arguments(path: Path, kind: type[TrainingArguments] = TrainingArguments, **options: Any) -> TrainingArguments:
    """Two epochs of six micro-batches, on the CPU, with every loss logged."""
    settings: dict[str, Any] = dict(
        output_dir=str(path), use_cpu=True, per_device_train_batch_size=4, num_train_epochs=2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=3,
    )  # fmt: skip
    return kind(**{**settings, **options})


def trainer_of(path: Path, *callbacks: TrainerCallback, model: Any = None, data: Any = None, **options: Any) -> Trainer:
    """A Trainer of a model that is the same every time."""
    torch.manual_seed(3)
    data = rows() if data is None else data
    given = {"model_init": options.pop("model_init")} if "model_init" in options else {"model": model or Model()}
    trainer = Trainer(
        **given, args=arguments(path, **options), train_dataset=data, eval_dataset=rows(8), callbacks=list(callbacks)
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(path: Path, *callbacks: TrainerCallback, resume: Path | None = None, **options: Any) -> Trainer:
    """A Trainer that has trained."""
    trainer = trainer_of(path, *callbacks, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer: Trainer) -> list[float]:
    """What the Trainer has logged."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(trainer: Trainer, other: Trainer) -> bool:
    """Whether two trainings ended alike, to the last bit."""
    pairs = zip(weights(trainer), weights(other), strict=True)
    return losses(trainer) == losses(other) and all(torch.equal(a, b) for a, b in pairs)


def files() -> list[Path]:
    return sorted(Path("repflow-runs").glob("*.db"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_line(tmp_path) -> None:
    trainer = train(tmp_path, RepresentationMonitorCallback(every_n_steps=5))
    (path,) = files()
    with open_run(path) as run:
        assert run.step.values.tolist() == [0, 5, 10]
        assert run.tokens.values.tolist() == [32] * 3 and run.sequences.values.tolist() == [4] * 3
        assert run.attrs["model_class"] == "Model" and run.block_name.values[0] == "gpt_neox.layers.0"
        assert run.loss.values.tolist() == pytest.approx([losses(trainer)[step] for step in (0, 5, 10)], rel=1e-6)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_bit_identical_and_right_under_accumulation(tmp_path, accumulate) -> None:
    """6 micro-batches an epoch: with 4 to a step, each epoch ends with a step of 2."""
    bare = train(tmp_path / "bare", gradient_accumulation_steps=accumulate)
    state, keep = torch.get_rng_state(), Keep()
    callback = RepresentationMonitorCallback(every_n_steps=1, sinks=[keep])
    watched = train(tmp_path / "watched", callback, gradient_accumulation_steps=accumulate)
    assert same(bare, watched) and torch.equal(torch.get_rng_state(), state)
    sizes = {1: [1] * 12, 2: [2] * 6, 4: [4, 2, 4, 2]}[accumulate]
    assert keep.steps == list(range(len(sizes)))
    assert keep.tokens == [32 * size for size in sizes]
    assert [snapshot.scalars["loss"] for snapshot in keep.snapshots] == pytest.approx(losses(watched), rel=1e-6)
    assert sum(hooks(watched.model)) == 0
