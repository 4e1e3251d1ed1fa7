"""The regularizer under real trainers: they train what a loop does that has the term in its loss."""

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import pytest
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from repflow.callbacks import (
    DualAscent,
    RepresentationMonitor,
    RepresentationMonitorCallback,
    RepresentationRegularizer,
)
from repflow.callbacks._loss_scales import lightning_scale
from repflow.monitor.warning import RepflowWarning
from tests.callbacks.watching import Keep, hooks
from tests.monitor.regularizing import states_of, term

pytestmark = [
    pytest.mark.usefixtures("untyped"),
    pytest.mark.filterwarnings(
        "ignore:.*(does not have many workers|fewer than the logging interval|is not empty|isinstance.treespec)"
    ),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]

LAYERS, TARGET, STRENGTH, RATE = (1, 3), -0.2, 0.8, 0.1


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def language_model(dtype: torch.dtype = torch.float64) -> Any:
    """Three blocks without dropout, the same every time."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        net.model.embed_tokens.weight += 0.02  # as much as random tokens differ by, so that they are alike
    return net.double() if dtype == torch.float64 else net


def rows(number: int = 24) -> list[dict[str, Tensor]]:
    """Sequences of ten tokens, of which some are padding."""
    ids = torch.randint(0, 64, (number, 10), generator=torch.Generator().manual_seed(1))
    masks = torch.ones_like(ids)
    masks[::3, 6:] = 0
    return [
        {"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)}
        for row, mask in zip(ids, masks, strict=True)
    ]


def regularizer(**options: Any) -> RepresentationRegularizer:
    given = {"target": TARGET, "layers": LAYERS, "strength": STRENGTH, **options}
    return RepresentationRegularizer(**given)


def by_hand(accumulation: int, steps: int, *, strength: float = STRENGTH, tokens: bool = False) -> list[Tensor]:
    """Weights after SGD on the loss with the term: the mean over micro-batches, or over the tokens of a step."""
    net, data = language_model(), rows()
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    for step in range(steps):
        parts = [data[4 * (step * accumulation + part) :][:4] for part in range(accumulation)]
        batches = [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        for batch, count in zip(batches, counts, strict=True):
            with states_of(net.model.layers, LAYERS) as states:
                loss = net(**batch).loss
            share = count / sum(counts) if tokens else 1 / accumulation
            (loss * share + strength * term(states, batch["attention_mask"], TARGET) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in net.parameters()]


def assert_same(net: Any, want: list[Tensor]) -> None:
    for one, other in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-9, atol=1e-12)


class Module(LightningModule):
    """What a user has: nothing in it knows of the regularizer."""

    def __init__(self, dtype: torch.dtype = torch.float64, manual: bool = False) -> None:
        super().__init__()
        self.net = language_model(dtype)
        self.automatic_optimization = not manual

    def training_step(self, batch, index):
        loss = self.net(**batch).loss
        if not self.automatic_optimization:
            self.manual_backward(loss / 2)
            self.optimizers().step()  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizers().zero_grad()  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


def fit(module: LightningModule, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = dict(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, precision="64-true",
    )  # fmt: skip
    trainer = lightning.Trainer(callbacks=list(callbacks), **{**settings, **options})
    trainer.fit(module, DataLoader(rows(), 4), ckpt_path=ckpt_path)  # pyright: ignore[reportArgumentType]
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning(accumulation: int) -> None:
    module = Module()
    before = hooks(module)
    trainer = fit(module, regularizer(), accumulate_grad_batches=accumulation)
    assert_same(module.net, by_hand(accumulation, 6 // accumulation))
    assert hooks(module) == before
    for layer in LAYERS:
        logged = {
            name: float(trainer.callback_metrics[f"repflow/regularizer/{name}/state_{layer:02}"])
            for name in ("similarity", "strength", "gradient_ratio")
        }
        assert logged["strength"] == pytest.approx(STRENGTH) and logged["gradient_ratio"] > 0
        assert -1 <= logged["similarity"] <= 1


def test_lightning_with_a_scaler() -> None:
    """fp16 autocast on a CPU, whose states are narrow: the weights come near, and without the term they do not."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    module = Module(torch.float32)
    fit(module, regularizer(), plugins=[plugin], precision=None, accumulate_grad_batches=2)
    want, without = by_hand(2, 3), by_hand(2, 3, strength=0.0)
    start = list(language_model().parameters())
    off, away = (
        sum(float((a.double() - b).square().sum()) for a, b in zip(module.net.parameters(), other, strict=True)) ** 0.5
        for other in (want, without)
    )
    moved = sum(float((a - b).square().sum()) for a, b in zip(want, start, strict=True)) ** 0.5
    assert off < 0.02 * moved and away > 0.1 * moved


def test_lightning_by_hand_follows_the_loss_of_the_model() -> None:
    module = Module(manual=True)
    fit(module, regularizer())
    net = Module(manual=True).net
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    for batch in DataLoader(rows(), 4):  # pyright: ignore[reportArgumentType]
        with states_of(net.model.layers, LAYERS) as states:
            loss = net(**batch).loss
        ((loss + STRENGTH * term(states, batch["attention_mask"], TARGET)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(module.net, list(net.parameters()))


def test_lightning_resumes(tmp_path: Path) -> None:
    controller = DualAscent(step_size=0.5, maximum=3.0)
    whole = Module()
    fit(whole, regularizer(strength=controller), max_epochs=2)
    module = Module()
    trainer = fit(module, regularizer(strength=controller))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = Module()
    fit(again, resumed := regularizer(strength=controller), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert_same(again.net, list(whole.net.parameters()))
    assert resumed.state_dict()["step"] == 12 and min(resumed.state_dict()["strength"]) > 0


def test_a_checkpoint_that_is_written_because_of_an_exception_has_its_state(tmp_path: Path) -> None:
    controller = DualAscent(step_size=0.5, maximum=3.0)
    callback = regularizer(strength=controller)

    class Failing(Module):
        def training_step(self, batch, index):
            if index == 4:
                raise ZeroDivisionError
            return super().training_step(batch, index)

    with pytest.raises(ZeroDivisionError):
        fit(Failing(), callback, OnExceptionCheckpoint(tmp_path, "last"), enable_checkpointing=True)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"][callback.state_key]
    assert kept == callback.state_dict() and kept["step"] == 4 and min(kept["strength"]) > 0
    assert callback.metrics[f"repflow/regularizer/strength/state_{LAYERS[0]:02}"] > 0
    fit(Module(), callback, max_epochs=1)  # a new training begins anew
    assert callback.state_dict()["step"] == 6


class Skips(Module):
    """Leaves out a batch, before its forward or behind it, as where the loss is not finite."""

    def __init__(self, skipped: tuple[int, ...], *, behind: bool) -> None:
        super().__init__()
        self.skipped, self.behind = skipped, behind

    def training_step(self, batch, index):
        skips = index in self.skipped
        loss = None if skips and not self.behind else self.net(**batch).loss
        return None if skips else loss


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("way", ["eager", "compiled", "accumulating"])
def test_batches_that_are_skipped(way: str, behind: bool) -> None:
    """A step of these alone moves no λ; beside others in a step they bring nothing."""
    torch.compiler.reset()
    accumulation = 2 if way == "accumulating" else 1
    module = Skips((2, 3, 4), behind=behind)
    if way == "compiled":
        module.net.compile(backend="aot_eager")
    callback = regularizer()
    trainer = fit(module, callback, accumulate_grad_batches=accumulation)
    assert callback.state_dict()["step"] == 6 // accumulation - (3 if accumulation == 1 else 1)
    assert trainer.global_step == 6 // accumulation
    net = language_model()
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    for index, batch in enumerate(DataLoader(rows(), 4)):  # pyright: ignore[reportArgumentType]
        if index not in module.skipped:
            with states_of(net.model.layers, LAYERS) as states:
                loss = net(**batch).loss
            ((loss + STRENGTH * term(states, batch["attention_mask"], TARGET)) / accumulation).backward()
        if (index + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(module.net, list(net.parameters()))


def test_a_loss_that_passes_the_layers_by_is_no_skipped_batch() -> None:
    class Aside(Module):
        def training_step(self, batch, index):
            self.net(**batch)
            return self.net.lm_head.weight.square().mean()

    with pytest.raises(RuntimeError, match="a training forward has run and no gradient has come back"):
        fit(Aside(), regularizer())


def test_fsdp2_of_lightning() -> None:
    """One process of it; what is spread over ranks by tensor parallelism is refused."""

    class Sharded(Module):
        def configure_model(self):
            mesh = self.device_mesh["data_parallel"]  # pyright: ignore[reportOptionalSubscript]
            for block in self.net.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

        def on_fit_end(self):
            whole = {name: weight.full_tensor() for name, weight in self.net.state_dict().items()}
            self.trained = language_model()
            self.trained.load_state_dict(whole)

    module = Sharded()
    options: dict[str, Any] = {"precision": "32-true", "use_distributed_sampler": False}  # float64 stays as it is
    options["strategy"] = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    try:
        with patch.dict(os.environ):
            fit(module, regularizer(), devices=1, **options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert_same(module.trained, by_hand(1, 6))
    trainer = type("Spread", (), {"strategy": ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)})
    with pytest.raises(ValueError, match=r"got ModelParallelStrategy with tensor_parallel_size=2; pass tensor_"):
        lightning_scale(trainer, module)


def test_lightning_without_a_term_is_the_same_to_the_bit() -> None:
    module, plain = Module(torch.float32), Module(torch.float32)
    fit(module, regularizer(strength=0.0), precision="32-true")
    fit(plain, precision="32-true")
    assert all(map(torch.equal, module.parameters(), plain.parameters()))


def test_its_values_are_in_the_snapshots_of_a_monitor() -> None:
    monitor = RepresentationMonitor(every_n_steps=1, sinks=(sink := Keep()))
    fit(Module(torch.float32), monitor, regularizer(monitor=monitor), precision="32-true", accumulate_grad_batches=2)
    assert len(sink.snapshots) == 3
    for snapshot in sink.snapshots:
        measured = [float(snapshot.inter_token[layer]) for layer in LAYERS]
        assert snapshot.scalars["regularizer_similarity"] == pytest.approx(sum(measured) / 2, abs=1e-5)


def test_errors_reach_the_user() -> None:
    module = Module()
    with pytest.raises(ValueError, match=r"layers from 1 to 3, .* got \[7\]"):
        fit(module, regularizer(layers=[7]))
    with pytest.raises(ValueError, match=r"target in \[-1, 1\]"):
        regularizer(target=2)
    for parameter in module.net.model.parameters():
        parameter.requires_grad_(False)
    before = hooks(module)
    with pytest.raises(RuntimeError, match="everything up to there is frozen"):
        fit(module, regularizer())
    assert hooks(module) == before


def train(path: Path, *callbacks: Any, net: Any = None, resume: Any = None, scaler: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(path), use_cpu=True, per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=3, optim="sgd", learning_rate=RATE,
        lr_scheduler_type="constant", max_grad_norm=0.0, train_sampling_strategy="sequential",
    )  # fmt: skip
    args = transformers.TrainingArguments(**{**settings, **options})
    trainer = transformers.Trainer(net or language_model(), args, train_dataset=rows(), callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.accelerator.scaler = scaler
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("accumulation", "options"),
    [
        (1, {}),
        (2, {}),
        (4, {}),
        (2, {"gradient_checkpointing": True}),
        (2, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ],
    ids=str,
)
def test_transformers(tmp_path: Path, accumulation: int, options: dict[str, Any]) -> None:
    """Its loss is divided by the tokens of all micro-batches; the term is the mean over these."""
    net = language_model()
    before = hooks(net)
    trainer = train(tmp_path, regularizer(), net=net, gradient_accumulation_steps=accumulation, **options)
    if accumulation < 4:
        assert_same(net, by_hand(accumulation, 6 // accumulation, tokens=True))
    else:  # the epoch's last step has two micro-batches
        assert trainer.state.global_step == 2
    assert options or hooks(net) == before  # with checkpointing the Trainer leaves one of its own
    logged = [entry for entry in trainer.state.log_history if "repflow/regularizer/strength/state_01" in entry]
    assert len(logged) == trainer.state.global_step == sum("loss" in entry for entry in trainer.state.log_history)
    assert all(entry["repflow/regularizer/strength/state_01"] == STRENGTH for entry in logged)


def test_transformers_with_a_scaler(tmp_path: Path) -> None:
    """As the Accelerator has it for fp16, whose scale grows while it trains: the term grows with the loss."""
    net, scaler = language_model(), torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)
    train(tmp_path, regularizer(), net=net, scaler=scaler, gradient_accumulation_steps=2)
    assert scaler.get_scale() == 2.0**15
    assert_same(net, by_hand(2, 3, tokens=True))


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path: Path) -> None:
    net = language_model()
    train(tmp_path, regularizer(), net=net, gradient_accumulation_steps=4, max_steps=2)
    plain, data = language_model(), rows()
    optimizer = torch.optim.SGD(plain.parameters(), RATE)
    for first, parts in ((0, 4), (16, 2)):
        batches = [
            {key: torch.stack([row[key] for row in data[first + 4 * part :][:4]]) for key in data[0]}
            for part in range(parts)
        ]
        total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            with states_of(plain.model.layers, LAYERS) as states:
                loss = plain(**batch).loss * int((batch["labels"][:, 1:] != -100).sum()) / total
            (loss + STRENGTH * term(states, batch["attention_mask"], TARGET) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(net, list(plain.parameters()))


def test_transformers_resumes(tmp_path: Path) -> None:
    controller = DualAscent(step_size=0.5, maximum=3.0)
    whole, half = language_model(), language_model()
    train(tmp_path / "whole", regularizer(strength=controller), net=whole)
    train(
        tmp_path / "half", regularizer(strength=controller), net=half, save_strategy="steps", save_steps=3, max_steps=3
    )
    again = language_model()
    resumed = regularizer(strength=controller)
    train(tmp_path / "half", resumed, net=again, resume=str(tmp_path / "half" / "checkpoint-3"))
    assert_same(again, list(whole.parameters()))
    assert resumed.state_dict()["step"] == 6 and min(resumed.state_dict()["strength"]) > 0


def test_transformers_resumes_with_other_choices(tmp_path: Path) -> None:
    """Two regularizers; each finds its own λ whatever its target now is, and one of other layers raises."""
    controller = DualAscent(step_size=0.5, maximum=3.0)
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(tmp_path, *(regularizer(strength=controller, layers=[layer]) for layer in LAYERS), **saving)
    checkpoint = str(tmp_path / "checkpoint-4")
    seen: list[dict[str, Any]] = []

    class Look(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.extend(one.state_dict() for one in again)

    changed = {"strength": controller, "target": TARGET + 0.05, "max_documents": 3}
    again = [regularizer(layers=[layer], **changed) for layer in (1, -1)]
    train(tmp_path / "on", *again, Look(), resume=checkpoint, max_steps=5)
    records = json.loads(Path(checkpoint, "trainer_state.json").read_text())["stateful_callbacks"]
    last = records["RepresentationRegularizer"][-2:]
    assert seen == [record["attributes"]["_resumed"] for record in last]
    assert [state["step"] for state in seen] == [4, 4] and min(state["strength"][0] for state in seen) > 0
    net = language_model()
    before = hooks(net)
    with pytest.raises(ValueError, match=r"λ of layers \[2\] of stream None, got one with that of layers \[1\] of"):
        train(tmp_path / "other", regularizer(layers=[2]), net=net, resume=checkpoint, max_steps=5)
    assert hooks(net) == before


def test_training_again_after_it_was_interrupted(tmp_path: Path) -> None:
    """The Trainer tells nobody. The same callback cleans up; a new one replaces the old one, and says so."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    net, callback = language_model(), regularizer()
    before = hooks(net)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, callback, Stop(), net=net)
    with pytest.warns(RepflowWarning, match="replaced the regularizer of layers"):
        train(tmp_path, regularizer(), net=net)
    assert hooks(net) == before


def test_a_checkpoint_cannot_stand_in_for_the_users_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected restore_callback_states_from_checkpoint=False"):
        train(tmp_path, regularizer(), restore_callback_states_from_checkpoint=True)


def test_lightning_with_a_compiled_module() -> None:
    torch.compiler.reset()
    module = Module()
    fit(torch.compile(module, backend="aot_eager"), regularizer(), accumulate_grad_batches=2)  # pyright: ignore[reportArgumentType]
    assert_same(module.net, by_hand(2, 3))


def test_with_the_monitor_of_the_same_trainer(tmp_path: Path) -> None:
    monitor = RepresentationMonitorCallback(every_n_steps=1, sinks=(keep := Keep()))
    train(tmp_path, monitor, regularizer(monitor=monitor), gradient_accumulation_steps=2)
    assert keep.steps == [0, 1, 2]
    for snapshot in keep.snapshots:
        measured = [float(snapshot.inter_token[layer]) for layer in LAYERS]
        assert snapshot.scalars["regularizer_similarity"] == pytest.approx(sum(measured) / 2, abs=1e-5)


def test_copies_take_the_choices_along_and_no_model(tmp_path: Path) -> None:
    callback = regularizer()
    callback.attach(language_model())
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.metrics == {} and twin._options == callback._options
        twin.attach(language_model())
        assert twin._attached().layers == LAYERS


def test_ways_of_training_that_scale_the_loss_out_of_sight() -> None:
    from repflow.callbacks._loss_scales import transformers_scale

    class Accelerator:
        parallelism_config = type("Config", (), {"tp_enabled": False, "cp_enabled": True, "sp_enabled": False})()

    class Borrowed:
        accelerator, is_deepspeed_enabled, args = Accelerator(), False, type("Args", (), {"n_gpu": 1})()

    with pytest.raises(ValueError, match="one device, DDP or FSDP, got cp parallelism"):
        transformers_scale(Borrowed)
    with pytest.raises(RuntimeError, match=r"called by a transformers.Trainer"):
        transformers_scale(lambda: None)
