"""The Hugging Face callback under a real Trainer."""

import ast
import copy
import gc
import json
import os
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from repflow.callbacks import RepresentationMonitorCallback
from repflow.monitor import MonitorConfig, RepflowWarning, open_run
from repflow.monitor.signatures import DeadBlocks
from repflow.monitor.sinks import RunFileSink
from tests.callbacks.slices import check_whole_sequences
from tests.callbacks.watching import Keep, hooks

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


class Model(transformers.GPTNeoXForCausalLM):
    """GPT-NeoX with dropout. `fail_at`: number of the training forward that raises, once."""

    fail_at: int | None = None
    fault: type[BaseException] = ZeroDivisionError
    forwards = 0

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or transformers.GPTNeoXConfig(**SIZES, hidden_dropout=0.1))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
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


def trainer_of(path: Path, *callbacks: TrainerCallback, model: Any = None, data: Any = None, **options: Any) -> Any:
    """A Trainer of a model that is the same every time."""
    torch.manual_seed(3)
    data = rows() if data is None else data
    given: dict[str, Any] = (
        {"model_init": options.pop("model_init")} if "model_init" in options else {"model": model or Model()}
    )
    trainer = Trainer(
        **given, args=arguments(path, **options), train_dataset=data, eval_dataset=rows(8), callbacks=list(callbacks)
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(path: Path, *callbacks: TrainerCallback, resume: Path | None = None, **options: Any) -> Any:
    """A Trainer that has trained."""
    trainer = trainer_of(path, *callbacks, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer: Any) -> list[float]:
    """What the Trainer has logged."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def weights(trainer: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(trainer: Any, other: Any) -> bool:
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


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_a_probe_batch(tmp_path, precision) -> None:
    """The same tokens at every step, once per step under accumulation, and training does not see it."""
    options = {"gradient_accumulation_steps": 2, **precision}
    bare, keep = train(tmp_path / "bare", **options), Keep()
    batch = {name: torch.stack([row[name] for row in rows(3)]) for name in ("input_ids", "attention_mask")}
    callback = RepresentationMonitorCallback(every_n_steps=1, sinks=[keep], probe_batch=batch | {"use_cache": False})
    watched = train(tmp_path / "watched", callback, **options)
    assert same(bare, watched) and sum(hooks(watched.model)) == 0
    assert keep.steps == list(range(6)) and keep.tokens == [24] * 6
    last, earlier = (keep.snapshots[step].drift_first for step in (-1, 1))
    assert last is not None and earlier is not None and (last < earlier).all()
    assert [snapshot.scalars["loss"] for snapshot in keep.snapshots] == pytest.approx(losses(watched), rel=1e-6)


def test_the_loss_is_that_of_the_step_however_often_the_trainer_logs(tmp_path) -> None:
    every = train(tmp_path / "every")
    keep = Keep()
    train(tmp_path / "third", RepresentationMonitorCallback(every_n_steps=2, sinks=[keep]), logging_steps=3)
    expected = [losses(every)[step] for step in keep.steps]
    assert [snapshot.scalars["loss"] for snapshot in keep.snapshots] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_the_trainer_computes_itself(tmp_path) -> None:
    """Label smoothing takes the labels away from the model."""
    keep = Keep()
    callback = RepresentationMonitorCallback(every_n_steps=1, sinks=[keep])
    trainer = train(tmp_path, callback, label_smoothing_factor=0.1, gradient_accumulation_steps=2)
    assert [snapshot.scalars["loss"] for snapshot in keep.snapshots] == pytest.approx(losses(trainer), rel=1e-6)


def test_evaluation_and_generation_do_not_count(tmp_path) -> None:
    class Generate(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs) -> None:
            """In the middle of an accumulated step."""
            with torch.no_grad():
                kwargs["model"].generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, do_sample=False)

    keep = Keep()
    callback = RepresentationMonitorCallback(every_n_steps=1, sinks=[keep])
    options: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer = train(tmp_path, callback, Generate(), gradient_accumulation_steps=2, **options)
    before = len(keep.snapshots)
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert keep.steps == list(range(6)) and keep.tokens == [64] * 6 and len(keep.snapshots) == before


@pytest.mark.usefixtures("untyped")
def test_fault_in_the_monitor_changes_nothing(tmp_path, monkeypatch) -> None:
    bare = train(tmp_path / "bare")
    callback = RepresentationMonitorCallback(every_n_steps=1, sinks=[])

    class Plant(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            def broken(*args: Any) -> None:
                raise RuntimeError("planted")

            assert callback.monitor is not None
            monkeypatch.setattr(callback.monitor._capture, "_store", broken)

    with pytest.warns(RepflowWarning, match="stopped monitoring at step 0: RuntimeError: planted"):
        watched = train(tmp_path / "watched", callback, Plant())
    assert same(bare, watched) and sum(hooks(watched.model)) == 0


def test_a_reporter_that_fails_changes_nothing(tmp_path) -> None:
    class Torn:
        def add_scalar(self, *args: Any) -> None:
            raise OSError("planted")

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    class Quiet(TensorBoardCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    with pytest.warns(RepflowWarning, match="_Board failed with OSError: planted; it gets nothing more"):
        train(tmp_path, Quiet(Torn()), RepresentationMonitorCallback(every_n_steps=5))
    assert open_run(files()[0]).step.values.tolist() == [0, 5, 10]


class TestTrainingRaises:
    """The Trainer tells no callback. Forward 8 is in step 7, which is sampled."""

    def crash(self, path: Path, callback: RepresentationMonitorCallback, fault: type[BaseException]) -> Any:
        trainer = trainer_of(path, callback)
        trainer.model.fail_at, trainer.model.fault = 8, fault
        with pytest.raises(fault, match="in the user's model"):
            trainer.train()
        return trainer

    @pytest.mark.parametrize("fault", [ZeroDivisionError, KeyboardInterrupt], ids=lambda fault: fault.__name__)
    def test_with_leaves_nothing_behind(self, tmp_path, fault) -> None:
        path = tmp_path / "run.db"
        with RepresentationMonitorCallback(every_n_steps=1, sinks=[RunFileSink(path)]) as callback:
            trainer = self.crash(tmp_path, callback, fault)
            assert sum(hooks(trainer.model)) > 0
        assert sum(hooks(trainer.model)) == 0
        assert not path.with_name("run.db-wal").exists()  # closed
        assert open_run(path).step.values.tolist() == list(range(7))

    def test_training_again(self, tmp_path) -> None:
        """On the same Trainer and callback: a run of its own, and the bits of a Trainer without callback."""
        callback = RepresentationMonitorCallback(every_n_steps=1)
        trainer = self.crash(tmp_path, callback, ZeroDivisionError)
        bare = trainer_of(tmp_path)
        bare.model.fail_at = 8
        with pytest.raises(ZeroDivisionError):
            bare.train()
        for again in (trainer, bare):
            torch.manual_seed(4)
            again.train()
        assert same(trainer, bare) and sum(hooks(trainer.model)) == 0
        assert sorted(open_run(path).step.size for path in files()) == [7, 12]

    def test_dropping_the_callback(self, tmp_path) -> None:
        trainer = self.crash(tmp_path, RepresentationMonitorCallback(every_n_steps=1), ZeroDivisionError)
        model = trainer.model
        trainer.pop_callback(RepresentationMonitorCallback)
        gc.collect()
        assert sum(hooks(model)) == 0
        assert open_run(files()[0]).step.size == 7 and not list(Path("repflow-runs").glob("*-wal"))

    def test_a_smaller_batch_after_running_out_of_memory(self, tmp_path) -> None:
        """As `auto_find_batch_size` tries it, within one call of `train`."""
        keep = Keep()
        trainer = trainer_of(
            tmp_path, RepresentationMonitorCallback(every_n_steps=1, sinks=[keep]), auto_find_batch_size=True
        )
        trainer.model.fail_at, trainer.model.fault = 3, RuntimeError
        trainer.train()
        assert keep.steps[:2] == [0, 1] and keep.steps[2:] == list(range(trainer.state.global_step))
        assert trainer.state.train_batch_size < 4 and sum(hooks(trainer.model)) == 0


class TestResume:
    """From the checkpoint in the middle of a training of twelve steps."""

    def saved(self, path: Path, *callbacks: RepresentationMonitorCallback) -> Path:
        train(path, *callbacks, save_strategy="steps", save_steps=6)
        return path / "checkpoint-6"

    def resume(self, checkpoint: Path, *callbacks: RepresentationMonitorCallback, **options: Any) -> Any:
        return train(checkpoint.parent, *callbacks, resume=checkpoint, save_strategy="steps", save_steps=6, **options)

    def test_the_same_run_file_goes_on(self, tmp_path) -> None:
        checkpoint = self.saved(tmp_path, RepresentationMonitorCallback(every_n_steps=4))
        resumed = RepresentationMonitorCallback(every_n_steps=4)
        self.resume(checkpoint, resumed)
        (path,) = files()
        run = open_run(path)
        assert run.step.values.tolist() == [0, 4, 8] and run.attrs["attempt"] == 2
        assert resumed.monitor is not None and resumed.monitor.run.name == path.stem

    def test_what_was_raised_is_not_raised_again(self, tmp_path) -> None:
        always = DeadBlocks(threshold=-1.0, release=-1.0, patience=1, warmup_steps=0)

        def callback() -> RepresentationMonitorCallback:
            return RepresentationMonitorCallback(every_n_steps=4, signatures=(always,))

        self.resume(self.saved(tmp_path, callback()), callback())
        run = open_run(files()[0])
        assert run.attrs["attempt"] == 2 and run.step.values.tolist() == [0, 4, 8]
        assert [alert["step"] for alert in json.loads(run.attrs["alerts"])] == [0]

    @pytest.mark.usefixtures("untyped")  # JSON has lists for tuples
    def test_a_callback_that_the_trainer_restores(self, tmp_path) -> None:
        """It makes a new one, of what the checkpoint has of the old one's arguments."""
        config = MonitorConfig(every_n_steps=4, metrics=("inter_token",))
        checkpoint = self.saved(tmp_path, RepresentationMonitorCallback(config, blocks="gpt_neox.layers"))
        given = RepresentationMonitorCallback(blocks="gpt_neox.layers")
        trainer = self.resume(checkpoint, given, restore_callback_states_from_checkpoint=True)
        (restored,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, RepresentationMonitorCallback)]
        assert restored is not given and restored.config == config
        assert open_run(files()[0]).step.values.tolist() == [0, 4, 8]

    @pytest.mark.usefixtures("untyped")  # JSON has lists for tuples
    def test_what_a_checkpoint_cannot_hold_is_said(self, tmp_path) -> None:
        checkpoint = self.saved(tmp_path, RepresentationMonitorCallback(sinks=[Keep()]))
        with pytest.warns(RepflowWarning, match="was restored without sinks, which no checkpoint holds; to keep them"):
            self.resume(
                checkpoint, RepresentationMonitorCallback(sinks=[Keep()]), restore_callback_states_from_checkpoint=True
            )
        keep = Keep()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RepflowWarning)
            self.resume(checkpoint, RepresentationMonitorCallback(every_n_steps=4, sinks=[keep]))
        assert keep.steps == [8]

    def test_from_a_checkpoint_of_a_training_without_monitor(self, tmp_path) -> None:
        """And saving again after that."""
        checkpoint = self.saved(tmp_path)
        self.resume(checkpoint, RepresentationMonitorCallback(every_n_steps=4))
        assert open_run(files()[0]).step.values.tolist() == [8]
        assert "RepresentationMonitorCallback" in (tmp_path / "checkpoint-12" / "trainer_state.json").read_text()

    def test_two_monitors_find_their_own(self, tmp_path) -> None:
        def pair() -> list[RepresentationMonitorCallback]:
            whole = RepresentationMonitorCallback(every_n_steps=3)
            return [whole, RepresentationMonitorCallback(every_n_steps=6, blocks="gpt_neox.layers")]

        checkpoint = self.saved(tmp_path, *pair())
        self.resume(checkpoint, *reversed(pair()))
        runs = sorted(open_run(path).step.values.tolist() for path in files())
        assert runs == [[0, 3, 6, 9], [0, 6]]

    @pytest.mark.usefixtures("untyped")  # JSON has lists for tuples
    def test_the_state_is_plain(self, tmp_path) -> None:
        states = RepresentationMonitorCallback(every_n_steps=4, log_states=(0, -1), name="mine")
        checkpoint = self.saved(tmp_path, states)
        state: Any = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        stored = state.stateful_callbacks["RepresentationMonitorCallback"]
        assert stored["attributes"]["saved"]["name"] == "mine" and stored["attributes"]["saved"]["lost"] == []
        assert RepresentationMonitorCallback(**stored["args"]).config == states.config
        now = json.loads(json.dumps(states.state()))  # the signatures have seen more since
        assert now["attributes"]["saved"].pop("monitor").keys() == stored["attributes"]["saved"].pop("monitor").keys()
        assert now == stored


def test_each_training_has_a_run_of_its_own(tmp_path) -> None:
    """One callback, several trainings within a second, as in cross-validation."""
    callback = RepresentationMonitorCallback(every_n_steps=6)
    for _ in range(2):
        train(tmp_path, callback)
    assert [open_run(path).step.size for path in files()] == [2, 2]


class NumberedTrial(dict[str, float]):
    """A trial that the search calls by a number."""

    number = 7


def test_trials_of_a_hyperparameter_search(tmp_path) -> None:
    """`hyperparameter_search` calls `train` with a trial, and each begins with a model of its own."""
    callback = RepresentationMonitorCallback(every_n_steps=6, name="search")
    trainer = trainer_of(tmp_path, callback, model_init=lambda trial: Model())
    for rate in (1e-3, 1e-4):
        trainer.train(trial={"learning_rate": rate})
    # As a study of Optuna goes on, whose number `BestRun` and the folder of checkpoints have.
    trainer.train(trial=NumberedTrial(learning_rate=1e-5))
    assert [path.name for path in files()] == [f"search-trial-{number}.db" for number in (0, 1, 7)]
    assert [open_run(path).attrs["attempt"] for path in files()] == [1, 1, 1]


def test_an_epoch_that_ends_in_the_middle_of_a_step(tmp_path) -> None:
    """Of a stream of five micro-batches, two to a step: nothing comes of the fifth by itself."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows(20))

    keep = Keep()
    callback = RepresentationMonitorCallback(every_n_steps=1, sinks=[keep])
    trainer = train(tmp_path, callback, data=Stream(), max_steps=6, gradient_accumulation_steps=2)
    assert keep.steps == list(range(trainer.state.global_step)) and set(keep.tokens) == {64}


def test_stopping_early(tmp_path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> Any:
            control.should_training_stop = state.global_step == 5
            return control

    callback = RepresentationMonitorCallback(every_n_steps=2)
    train(tmp_path, callback, Stop())
    assert open_run(files()[0]).step.values.tolist() == [0, 2, 4]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda options: next(iter(options))
)
def test_other_ways_to_run_the_model(tmp_path, options) -> None:
    bare, keep = train(tmp_path / "bare", **options), Keep()
    watched = train(tmp_path / "watched", RepresentationMonitorCallback(every_n_steps=1, sinks=[keep]), **options)
    assert same(bare, watched)
    assert keep.steps == list(range(12)) and set(keep.tokens) == {32}


@pytest.mark.usefixtures("untyped")
def test_compiled_by_the_trainer(tmp_path) -> None:
    """Which shows callbacks the model inside. Trained twice, and evaluated before, between and after."""
    torch.compiler.reset()
    keep = Keep()
    callback = RepresentationMonitorCallback(every_n_steps=2, sinks=[keep])
    trainer = trainer_of(tmp_path, callback, torch_compile=True, torch_compile_backend="eager", eval_on_start=True)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RepflowWarning)
            trainer.train()
        trainer.evaluate()
    assert keep.steps == [*range(0, 12, 2)] * 2 and set(keep.tokens) == {32}
    assert "loss" in keep.snapshots[-1].scalars


def test_low_rank_adapters(tmp_path) -> None:
    import peft

    torch.manual_seed(3)
    adapted = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["query_key_value"], lora_dropout=0.1)
    keep = Keep()
    model = peft.get_peft_model(Model(), adapted)
    trainer = train(tmp_path, RepresentationMonitorCallback(every_n_steps=4, sinks=[keep]), model=model)
    assert keep.steps == [0, 4, 8] and keep.tokens == [32] * 3
    assert keep.snapshots[0].scalars["loss"] == pytest.approx(losses(trainer)[0], rel=1e-6)


@pytest.mark.parametrize("stream", ["encoder", "decoder"])
def test_encoder_decoder_and_a_subclass_of_the_trainer(tmp_path, stream) -> None:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    sizes: dict[str, Any] = dict(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    data: Any = [{**row, "labels": row["input_ids"][:6]} for row in rows()]
    keep = Keep()
    trainer = Seq2SeqTrainer(
        transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)),
        arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            predict_with_generate=True,
            eval_strategy="epoch",
            generation_max_length=4,
        ),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[RepresentationMonitorCallback(every_n_steps=4, sinks=[keep], stream=stream)],
    )
    trainer.train()
    assert keep.steps == [0, 4, 8] and keep.tokens == [32 if stream == "encoder" else 24] * 3


def test_two_monitors_in_one_trainer(tmp_path) -> None:
    one, two = Keep(), Keep()
    first = RepresentationMonitorCallback(every_n_steps=1, sinks=one)
    second = RepresentationMonitorCallback(every_n_steps=4, sinks=two, blocks="gpt_neox.layers")
    train(tmp_path, first, second)
    assert len(one.snapshots) == 12 and two.steps == [0, 4, 8]
    assert torch.equal(one.snapshots[4].inter_token, two.snapshots[1].inter_token)


def test_events_without_a_trainer(tmp_path) -> None:
    """A loop that only borrows the callbacks: no loss, and the rest as usual."""
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

    keep, model, args = Keep(), Model(), arguments(tmp_path)
    callback = RepresentationMonitorCallback(every_n_steps=1, sinks=[keep])
    handler = CallbackHandler([DefaultFlowCallback(), callback], model, None, None, None)
    state, control = transformers.TrainerState(stateful_callbacks=[callback]), transformers.TrainerControl()
    handler.on_train_begin(args, state, control)
    handler.on_step_begin(args, state, control)
    model(**transformers.default_data_collator(rows(4))).loss.backward()
    handler.on_step_end(args, state, control)
    handler.on_train_end(args, state, control)
    assert keep.tokens == [32] and "loss" not in keep.snapshots[0].scalars


def test_unknown_structure_stops_before_the_first_step(tmp_path) -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            raise AssertionError("it has run")

    with pytest.raises(ValueError, match=r"found no ModuleList of modules with parameters; pass blocks="):
        train(tmp_path, RepresentationMonitorCallback(sinks=[]), model=Flat())


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match="unknown option every_step"):
        RepresentationMonitorCallback(every_step=3)
    with pytest.raises(ValueError, match='`RepresentationMonitorCallback`: expected log_states="auto", "all" or state'):
        RepresentationMonitorCallback(log_states="some")  # type: ignore[arg-type]


def test_a_copy_of_the_callback_leaves_the_engine_behind(tmp_path) -> None:
    callback = RepresentationMonitorCallback(every_n_steps=2, sinks=RunFileSink(tmp_path / "run.db"))
    trainer = TestTrainingRaises().crash(tmp_path, callback, ZeroDivisionError)  # while it is running
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.monitor is None and copied.config == callback.config
    assert trainer.model.forwards == 8


TWO_RANKS = """
import sys
from pathlib import Path
from repflow.callbacks import RepresentationMonitorCallback
from repflow.monitor.sinks import RunFileSink
from tests.callbacks.test_transformers import losses, train, trainer_of, weights

path = Path(sys.argv[1])
options = dict(ddp_backend="gloo", ddp_timeout=60, gradient_accumulation_steps=2, report_to="tensorboard")
bare = train(path / "bare", **options)
callback = RepresentationMonitorCallback(every_n_steps=1, sinks=[RunFileSink(path / "run.db")])
watched = train(path / "watched", callback, **options)
latest = callback.monitor.latest
values = [latest.step, latest.sums.tolist(), latest.scalars["loss"], losses(watched)]
values.append([w.double().sum().item() for w in weights(watched)])
same = losses(watched) == losses(bare) and all(map(lambda a, b: a.equal(b), weights(watched), weights(bare)))
rank = watched.args.process_index

crashing = trainer_of(path / "crash", RepresentationMonitorCallback(every_n_steps=1, name="crash"), **options)
crashing.model.fail_at = 3 if rank == 1 else None  # one rank alone: the other finds out when it meets it
crashed = False
try:
    crashing.train()
except (ZeroDivisionError, RuntimeError):
    crashed = True
(path / f"rank{rank}.txt").write_text(repr((values, same, crashed)))
"""


def run_both(folder: Path, script: str) -> list[Any]:
    """Two ranks run a script in a folder; what each wrote."""
    (folder / "ranks.py").write_text(script)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root)])
    command = [sys.executable, "ranks.py", str(folder)]
    processes = [
        subprocess.Popen(command, cwd=folder, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.wait(timeout=200)
    finally:
        for process in processes:
            process.kill()
    return [ast.literal_eval((folder / f"rank{rank}.txt").read_text()) for rank in range(2)]


def test_two_ranks(tmp_path) -> None:
    """DistributedDataParallel: the first rank writes, both know the same, and neither waits for one that crashed."""
    first, second = run_both(tmp_path, TWO_RANKS)
    assert first[0] == second[0] and first[1:] == second[1:] == (True, True)
    step, _, loss, logged, _ = first[0]
    run = open_run(tmp_path / "run.db")
    assert run.step.values.tolist() == list(range(step + 1)) and run.tokens.values.tolist() == [128, 64] * 2
    assert run.loss.values.tolist() == pytest.approx(logged, rel=1e-6) and run.loss.values[-1] == loss
    assert run.attrs["attempt"] == 1 and len(list(tmp_path.glob("watched/runs/*"))) == 1
    assert open_run(tmp_path / "repflow-runs" / "crash.db").step.values.tolist() == [0]


SLICES = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from transformers import Trainer
from repflow.callbacks import RepresentationMonitorCallback
from repflow.monitor.sinks import RunFileSink
from tests.callbacks.slices import States, cut
from tests.callbacks.test_transformers import Model, arguments, rows

class Slices(Trainer):
    "Both ranks have the same batches, and each its slices of them."
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, 4)

    def _prepare_inputs(self, inputs):
        return {name: cut(values, self.args.process_index) for name, values in inputs.items()}

def monitor(name, **options):
    return RepresentationMonitorCallback(every_n_steps=1, sinks=[RunFileSink(path / f"{name}.db")], **options)

def train(model, *callbacks):
    Slices(model, args, train_dataset=rows(), callbacks=list(callbacks)).train()

def slices(trainer):
    mesh = init_device_mesh("cpu", (1, trainer.args.world_size), mesh_dim_names=("dp", "cp"))
    return mesh["cp"].get_group()

def alone(trainer):
    return [dist.new_group([rank]) for rank in range(2)][trainer.args.process_index]

path = Path(sys.argv[1])
found = monitor("found", sequence_group=slices)  # there is no process group yet
args = arguments(path, num_train_epochs=1, ddp_backend="gloo", ddp_timeout=60)
given = monitor("given", sequence_group=dist.new_group())
model = Model()
states = States(model)
train(model, found, given, monitor("alone", process_group=alone), monitor("first", reduce=False))
states.save(path / f"states{args.process_index}.pt")
said = []
for options in ({"reduce": False}, {"skip_first_tokens": 1}):
    try:
        train(Model(), monitor("refused", sequence_group=slices, **options))
    except ValueError as error:
        said.append(str(error))
(path / f"rank{args.process_index}.txt").write_text(repr(said))
"""


def test_groups_that_are_made_after_the_callback(tmp_path) -> None:
    """Two ranks hold slices of the same sequences; a mistake is told on both, also where one of them measures alone."""
    first, second = run_both(tmp_path, SLICES)
    for name in ("found", "given"):
        check_whole_sequences(tmp_path, tmp_path / f"{name}.db")
    assert open_run(tmp_path / "found.db").tokens.values.tolist() == [32] * 6
    for name in ("alone", "first"):
        assert open_run(tmp_path / f"{name}.db").tokens.values.tolist() == [16] * 6
    assert first == second and len(first) == 2
    assert first[0].endswith("got reduce=False: a slice does not tell which tokens are first, and only all ranks "
                             "together have a whole sequence")  # fmt: skip
    assert "got skip_first_tokens=1: " in first[1]


def test_no_group_is_asked_for_where_there_is_one_process(tmp_path) -> None:
    def fail(trainer: Trainer) -> None:
        raise AssertionError("there are no groups")

    keep = Keep()
    callback = RepresentationMonitorCallback(sinks=keep, process_group=fail, sequence_group=fail)
    train(tmp_path, callback, max_steps=1)
    assert keep.tokens == [32]
