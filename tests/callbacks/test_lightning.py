"""The Lightning callback under a real Trainer."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from repflow.callbacks import RepresentationMonitor
from repflow.monitor import MonitorConfig, RepflowWarning, open_run
from repflow.monitor.sinks import RunFileSink
from tests.callbacks.slices import check_whole_sequences
from tests.callbacks.watching import Keep, hooks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|fewer than the logging interval|exists and is not empty|isinstance.treespec)"
)


class Model(LightningModule):
    """GPT-NeoX with dropout; remembers every micro-batch's loss. `fail_at`: micro-batch whose training step raises."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        config = transformers.GPTNeoXConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            hidden_dropout=0.1,
        )
        self.model = transformers.GPTNeoXForCausalLM(config)
        self.losses: list[float] = []
        self.fail_at = fail_at

    def training_step(self, batch, index):
        loss = self.model(input_ids=batch[0], attention_mask=batch[1], labels=batch[0]).loss
        if self.fail_at == len(self.losses):
            raise ZeroDivisionError("in the user's training step")
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(input_ids=batch[0], labels=batch[0]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def fit(path: Path, *callbacks: Callback, model: Any = None, ckpt_path=None, rows: int = 24, **options):
    """Train on `rows` rows in micro-batches of 4, two epochs by default."""
    lightning.seed_everything(3, verbose=False)
    model = Model() if model is None else model
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (rows, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    data = TensorDataset(ids, mask)
    settings = dict(
        max_epochs=2, accelerator="cpu", logger=CSVLogger(path), log_every_n_steps=1, default_root_dir=path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        settings["enable_checkpointing"] = True
    trainer = Trainer(callbacks=list(callbacks), **{**settings, **options})
    trainer.fit(model, DataLoader(data, 4, shuffle=True), DataLoader(data, 8), ckpt_path=ckpt_path)
    return model, trainer


def test_one_line(tmp_path, monkeypatch) -> None:
    """A run file under repflow-runs/, the loggers' files, callback_metrics; the first steps of every epoch."""
    monkeypatch.chdir(tmp_path)
    _, trainer = fit(tmp_path, RepresentationMonitor(every_n_steps=5))
    (path,) = Path("repflow-runs").glob("*.db")
    with open_run(path) as run:
        assert run.step.values.tolist() == [0, 5, 10]
        assert run.tokens.values.tolist() == [32] * 3 and run.sequences.values.tolist() == [4] * 3
        assert (
            run.attrs["model_class"] == "GPTNeoXForCausalLM" and run.block_name.values[0] == "model.gpt_neox.layers.0"
        )
        last = float(run.inter_token[-1, 2])
    assert float(trainer.callback_metrics["repflow/inter_token/state_02"]) == pytest.approx(last)
    (csv,) = tmp_path.rglob("metrics.csv")
    header, *rows = csv.read_text().splitlines()
    columns = header.split(",")
    logged = [row.split(",") for row in rows if row.split(",")[columns.index("repflow/v_loc")]]
    assert [int(row[columns.index("step")]) for row in logged] == [0, 5, 10]
    assert "repflow/inter_token/state_00" in columns


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_bit_identical_and_right_under_accumulation(tmp_path, accumulate) -> None:
    """6 micro-batches an epoch: with 4 to a step, each epoch ends with a step of 2."""
    bare, _ = fit(tmp_path / "bare", accumulate_grad_batches=accumulate)
    state, sink = torch.get_rng_state(), Keep()
    monitor = RepresentationMonitor(every_n_steps=1, sinks=[sink])
    watched, _ = fit(tmp_path / "watched", monitor, accumulate_grad_batches=accumulate)
    assert watched.losses == bare.losses and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), watched.parameters(), strict=True))
    sizes = {1: [1] * 12, 2: [2] * 6, 4: [4, 2, 4, 2]}[accumulate]
    assert [s.step for s in sink.snapshots] == list(range(len(sizes)))
    assert [s.tokens for s in sink.snapshots] == [32 * size for size in sizes]
    start = 0
    for snapshot, size in zip(sink.snapshots, sizes, strict=True):
        expected = sum(bare.losses[start : start + size]) / size
        assert snapshot.scalars["loss"] == pytest.approx(expected, rel=1e-6)
        start += size
    assert hooks(watched) == hooks(bare)


class PadsItself(Model):
    """Knows padding under a name of its own, and leaves the last token out."""

    def training_step(self, batch, index):
        ids, keep = batch
        logits = self.model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), (ids * keep)[:, 1:].flatten())
        self.losses.append(float(loss))
        return loss


def test_a_mask_from_the_batch(tmp_path) -> None:
    """Of each micro-batch its own; in one that does not fit, monitoring ends, and training does not."""
    sink, model = Keep(), PadsItself()
    monitor = RepresentationMonitor(every_n_steps=2, sinks=[sink], mask=lambda batch: batch[1][:, :-1])
    fit(tmp_path, monitor, model=model, accumulate_grad_batches=2)
    assert [s.tokens for s in sink.snapshots] == [64, 64, 64] and len(model.losses) == 12
    wrong, model = RepresentationMonitor(every_n_steps=1, sinks=[], mask=lambda batch: batch[1]), PadsItself()
    with pytest.warns(RuntimeWarning, match=r"expected a mask of shape \[4, 9\] like the states, got \[4, 10\]"):
        fit(tmp_path, wrong, model=model)
    assert len(model.losses) == 12


class WithForward(Model):
    """Can be called, and remembers in which precision it then computed its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, ids):
        logits = self.model(input_ids=ids).logits
        self.seen.append(logits.dtype)
        return logits


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_probe_batch(tmp_path, precision, dtype) -> None:
    """The same tokens at every step, in the trainer's precision, once per step; training does not see it."""
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "precision": precision}
    model = WithForward()
    bare, _ = fit(tmp_path / "bare", model=copy.deepcopy(model), **options)
    sink, ids = Keep(), torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(7))
    monitor = RepresentationMonitor(every_n_steps=1, sinks=[sink], probe_batch=ids)
    watched, trainer = fit(tmp_path / "watched", monitor, model=model, **options)
    assert watched.losses == bare.losses and hooks(watched) == hooks(bare)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), watched.parameters(), strict=True))
    assert sink.steps == list(range(6)) and sink.tokens == [30] * 6
    assert watched.seen == [dtype] * 6
    last, earlier = (sink.snapshots[step].drift_first for step in (-1, 1))
    assert last is not None and earlier is not None and (last < earlier).all()
    assert float(trainer.callback_metrics["repflow/drift_first/state_03"]) == pytest.approx(float(last[3]))


def test_sanity_checks_and_validation_are_not_recorded(tmp_path) -> None:
    sink = Keep()
    fit(tmp_path, RepresentationMonitor(every_n_steps=1, sinks=[sink]), val_check_interval=2, num_sanity_val_steps=3)
    assert [s.tokens for s in sink.snapshots] == [32] * 12
    assert [s.step for s in sink.snapshots] == list(range(12))


def test_validation_in_the_middle_of_an_accumulated_step(tmp_path) -> None:
    sink = Keep()
    monitor = RepresentationMonitor(every_n_steps=1, sinks=[sink])
    fit(tmp_path, monitor, val_check_interval=1, accumulate_grad_batches=3, max_epochs=1)
    assert [(s.step, s.tokens) for s in sink.snapshots] == [(0, 96), (1, 96)]


def test_validate_alone_measures_nothing(tmp_path) -> None:
    sink = Keep()
    trainer = Trainer(
        callbacks=[RepresentationMonitor(sinks=[sink])], logger=False, default_root_dir=tmp_path, accelerator="cpu",
        enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    ids = torch.randint(0, 64, (8, 10))
    trainer.validate(Model(), DataLoader(TensorDataset(ids, torch.ones_like(ids)), 4), verbose=False)
    assert sink.snapshots == []


def test_exception_in_the_users_step(tmp_path) -> None:
    """The run file keeps every finished step, the hooks are gone, and the exception is the user's own."""
    path = tmp_path / "run.db"
    model = Model(fail_at=7)
    before = hooks(Model())
    with pytest.raises(ZeroDivisionError, match="in the user's training step"):
        fit(tmp_path, RepresentationMonitor(every_n_steps=1, sinks=[RunFileSink(path)]), model=model)
    assert hooks(model) == before
    assert open_run(path).step.values.tolist() == list(range(7))


def test_interrupt(tmp_path) -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    path = tmp_path / "run.db"
    monitor = RepresentationMonitor(every_n_steps=1, sinks=[RunFileSink(path)])
    with pytest.raises(SystemExit):
        fit(tmp_path, Interrupt(), monitor)
    assert open_run(path).step.values.tolist() == list(range(4))  # the fifth step was cut off before the monitor's turn


def test_resume_goes_on_in_the_same_run_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit(tmp_path, RepresentationMonitor(every_n_steps=2), checkpoint, max_epochs=1)
    (path,) = Path("repflow-runs").glob("*.db")
    resumed = RepresentationMonitor(every_n_steps=2)
    fit(tmp_path, resumed, max_epochs=3, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    (path,) = Path("repflow-runs").glob("*.db")
    run = open_run(path)
    assert run.step.values.tolist() == list(range(0, 18, 2)) and run.attrs["attempt"] == 2


def test_early_stopping_sees_the_metrics(tmp_path) -> None:
    stop = EarlyStopping(
        "repflow/v_loc", mode="min", divergence_threshold=-1.0, patience=99, check_on_train_epoch_end=True
    )
    _, trainer = fit(tmp_path, stop, RepresentationMonitor(every_n_steps=4, sinks=[]))
    assert trainer.global_step == 6  # one epoch: V_loc is above −1, which counts as diverged


def test_fault_in_the_monitor_changes_nothing(tmp_path, monkeypatch) -> None:
    bare, _ = fit(tmp_path / "bare")
    callback = RepresentationMonitor(every_n_steps=1, sinks=[])

    class Plant(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            def broken(*args):
                raise RuntimeError("planted")

            assert callback.monitor is not None
            monkeypatch.setattr(callback.monitor._capture, "_store", broken)

    with pytest.warns(RepflowWarning, match="stopped monitoring at step 0: RuntimeError: planted"):
        watched, _ = fit(tmp_path / "watched", callback, Plant())
    assert watched.losses == bare.losses


def test_fitting_twice_and_without_loggers(tmp_path) -> None:
    path = tmp_path / "run.db"
    callback = RepresentationMonitor(MonitorConfig(every_n_steps=3), sinks=[RunFileSink(path)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RepflowWarning)
        fit(tmp_path, callback, logger=False, max_epochs=1)
        fit(tmp_path, callback, logger=False, max_epochs=2)
    assert open_run(path).step.values.tolist() == [0, 3, 6, 9]


def test_each_fit_has_a_run_of_its_own(tmp_path, monkeypatch) -> None:
    """As in cross-validation: one callback, several fits within a second."""
    monkeypatch.chdir(tmp_path)
    callback = RepresentationMonitor(every_n_steps=3)
    for _ in range(2):
        fit(tmp_path, callback, logger=False, max_epochs=1)
    assert [open_run(path).step.size for path in Path("repflow-runs").glob("*.db")] == [2, 2]


def test_two_monitors_in_one_trainer(tmp_path) -> None:
    one, two = Keep(), Keep()
    first = RepresentationMonitor(every_n_steps=1, sinks=[one], name="a")
    second = RepresentationMonitor(every_n_steps=2, sinks=[two], name="b", blocks="model.gpt_neox.layers")
    assert first.state_key != second.state_key
    fit(tmp_path, first, second, max_epochs=1)
    assert len(one.snapshots) == 6 and len(two.snapshots) == 3
    assert torch.equal(one.snapshots[2].inter_token, two.snapshots[1].inter_token)


def test_manual_optimization(tmp_path) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            loss = self.model(input_ids=batch[0], labels=batch[0]).loss
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

    sink = Keep()
    fit(tmp_path, RepresentationMonitor(every_n_steps=2, sinks=[sink]), model=Manual(), max_epochs=1)
    assert [s.step for s in sink.snapshots] == [0, 2, 4] and all("loss" in s.scalars for s in sink.snapshots)


@pytest.mark.parametrize("part", ["the LightningModule", "the model in it"])
@pytest.mark.usefixtures("untyped")
def test_compiled(part, tmp_path) -> None:
    """The trainer hands a compiled LightningModule on without its wrapper."""
    torch.compiler.reset()
    model, keep = Plain(), Keep()
    if part == "the model in it":
        model.model.compile(backend="eager", fullgraph=True)
    compiled = torch.compile(model, backend="eager") if part == "the LightningModule" else model
    fit(tmp_path, RepresentationMonitor(every_n_steps=2, sinks=[keep]), model=compiled, max_steps=4)
    assert [snapshot.step for snapshot in keep.snapshots] == [0, 2]


class Plain(Model):
    def training_step(self, batch, index):
        return self.model(input_ids=batch[0], attention_mask=batch[1], labels=batch[0]).loss


def test_errors_come_before_training() -> None:
    with pytest.raises(ValueError, match="expected every_n_steps of 1 or more, got 0"):
        RepresentationMonitor(every_n_steps=0)
    with pytest.raises(TypeError, match="unknown option every_step"):
        RepresentationMonitor(every_step=3)


def test_unknown_structure_stops_before_the_first_step(tmp_path) -> None:
    class Flat(Model):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Linear(2, 2)

    model = Flat()
    with pytest.raises(ValueError, match=r"found no ModuleList of modules with parameters; pass blocks="):
        fit(tmp_path, RepresentationMonitor(sinks=[]), model=model)
    assert model.losses == []


@pytest.mark.usefixtures("untyped")
def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match="expected mask as a function from a batch to its mask, got str; write mask="):
        RepresentationMonitor(mask="is_pad")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="expected a MonitorConfig, got 50; give its fields by name"):
        RepresentationMonitor(50)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='expected log_states="auto", "all" or state numbers, got \'some\''):
        RepresentationMonitor(log_states="some")  # type: ignore[arg-type]


def test_a_copy_of_the_callback_leaves_the_engine_behind(tmp_path) -> None:
    callback = RepresentationMonitor(every_n_steps=2, sinks=RunFileSink(tmp_path / "run.db"))
    fit(tmp_path, callback, max_epochs=1)
    assert callback.monitor is not None
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.monitor is None and copied.config == callback.config


def test_fast_dev_run_leaves_no_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = RepresentationMonitor(every_n_steps=1)
    fit(tmp_path, callback, fast_dev_run=True)
    assert callback.monitor is not None and callback.monitor.latest is not None
    assert not Path("repflow-runs").exists()


TWO_RANKS = """
import sys, torch
from contextlib import nullcontext
from pathlib import Path
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
from repflow.callbacks import RepresentationMonitor
from repflow.monitor.sinks import RunFileSink
from tests.callbacks.slices import States, cut
from tests.callbacks.test_lightning import Model, fit

class Plateau(Model):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "repflow/v_loc"}}

    def configure_model(self):
        if strategy == "fsdp1":
            self.model.config.use_cache = False
            policy = ModuleWrapPolicy({GPTNeoXLayer})
            self.model = FullyShardedDataParallel(self.model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
        elif strategy == "fsdp2":
            for module in (*self.model.gpt_neox.layers, self.model):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

class OnTheHost(FSDPStrategy):
    "Lightning refuses FSDPStrategy itself without a GPU; PyTorch does not, where a model is wrapped by hand."

strategies = {
    "ddp": lambda: "ddp",
    "fsdp1": lambda: OnTheHost(process_group_backend="gloo", activation_checkpointing_policy={GPTNeoXLayer}),
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}
for strategy, make in strategies.items():
    path = Path(sys.argv[1], strategy)
    callback = RepresentationMonitor(every_n_steps=1, sinks=[RunFileSink(path / "run.db")])
    options = dict(max_epochs=3, strategy=make(), devices=2, num_sanity_val_steps=0)
    model, trainer = fit(path, callback, model=Plateau(), **options)
    checkpointed = [name for name, _ in model.named_modules() if name.endswith("_checkpoint_wrapped_module")]
    assert len(checkpointed) == (3 if strategy == "fsdp1" else 0)
    values = [float(trainer.callback_metrics["repflow/v_loc"]), trainer.optimizers[0].param_groups[0]["lr"]]
    with FullyShardedDataParallel.summon_full_params(model.model) if strategy == "fsdp1" else nullcontext():
        whole = (getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters())
        values.append(sum(p.double().sum().item() for p in whole))
    values.append(callback.monitor.latest.sums.tolist())
    (path / f"rank{trainer.global_rank}.txt").write_text(repr(values))

class Slices(Model):
    "Both ranks have the same batch, and each its slice of it."
    def configure_model(self):
        if not hasattr(self, "states"):
            self.states = States(self.model)
            fully_shard(self.model, mesh=self.device_mesh["tensor_parallel"])

    def training_step(self, batch, index):
        return super().training_step([cut(values, self.global_rank) for values in batch], index)

path = Path(sys.argv[1], "slices")

def monitor(name, **groups):
    return RepresentationMonitor(every_n_steps=1, name=name, sinks=[RunFileSink(path / f"{name}.db")], **groups)

callbacks = (
    monitor("whole", sequence_group=lambda trainer: trainer.strategy.device_mesh["tensor_parallel"].get_group()),
    monitor("alone", process_group=lambda trainer: trainer.strategy.device_mesh["data_parallel"].get_group()),
)
strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
model, trainer = fit(path, *callbacks, model=Slices(), max_epochs=1, strategy=strategy, devices=2, limit_val_batches=0)
model.states.save(path / f"states{trainer.global_rank}.pt")
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each strategy, from two ranks that train under one after the other; Lightning starts the second."""
    folder = tmp_path_factory.mktemp("two_ranks")
    script = folder / "two_ranks.py"
    script.write_text(TWO_RANKS)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "src"), str(root)])
    command = [sys.executable, str(script), str(folder)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_two_ranks_decide_alike(two_ranks: Path, strategy: str) -> None:
    """Schedules that follow our scalars must not let the replicas drift apart. FSDP1 checkpoints its blocks, too."""
    folder = two_ranks / strategy
    first, second = ((folder / f"rank{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert open_run(folder / "run.db").tokens.values.tolist() == [64] * 9


def test_groups_that_are_made_after_the_callback(two_ranks: Path) -> None:
    """Two ranks hold slices of the same sequences, and each is alone in the mesh's dimension of data."""
    folder = two_ranks / "slices"
    check_whole_sequences(folder, folder / "whole.db")
    assert open_run(folder / "whole.db").tokens.values.tolist() == [32] * 6
    assert open_run(folder / "alone.db").tokens.values.tolist() == [16] * 6


def test_no_group_is_asked_for_where_there_is_one_process(tmp_path) -> None:
    def fail(trainer: Trainer) -> None:
        raise AssertionError("there are no groups")

    keep = Keep()
    fit(tmp_path, RepresentationMonitor(sinks=keep, process_group=fail, sequence_group=fail), max_steps=1)
    assert keep.tokens == [32]
