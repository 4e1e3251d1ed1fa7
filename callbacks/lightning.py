"""The Lightning callback: `Trainer(callbacks=[RepresentationMonitor()])`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from repflow._imports import LIGHTNING, PYTORCH_LIGHTNING, require
from repflow.callbacks._choices import Choices, GivenGroup, run_file_of
from repflow.monitor import Monitor, MonitorConfig, RunInfo, Snapshot
from repflow.monitor.probe import ProbeBatch
from repflow.monitor.sinks import AbstractSink, LoggerSink
from repflow.monitor.sinks._keys import StateChoice, scalar_items

require("lightning")
if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # One framework under two names, each with classes of its own. A Trainer calls whatever has a callback's methods,
    # but looks for its own Callback where it is given a single one, and so does the command line.
    _NAMES = {"lightning.pytorch": LIGHTNING, "pytorch_lightning": PYTORCH_LIGHTNING}
    Callback = type("Callback", tuple(import_module(name).Callback for name, found in _NAMES.items() if found), {})
    LightningModule = Trainer = Any


class RepresentationMonitor(Callback):
    """Monitors the representations of the model that a `Trainer` trains.

    ```python
    trainer = Trainer(callbacks=[RepresentationMonitor(every_n_steps=50)])
    ```

    Snapshots go to a run file, to all of the trainer's loggers, and into `trainer.callback_metrics` under the same keys
    (`repflow/inter_token/state_00`, `repflow/v_loc`, …), so that EarlyStopping and ModelCheckpoint can use them. Steps
    are optimizer steps, as the trainer's own metrics count them. The loss that `training_step` returns is kept with
    each snapshot. Alerts (see `MonitorConfig.signatures`) go there, too, and to the terminal. A W&B logger gets the run
    file as an artifact at the end. The Trainer may be that of `lightning.pytorch` or of `pytorch_lightning`.

    Args:
        config: what to measure. Its fields may be given as keywords instead: `RepresentationMonitor(every_n_steps=10)`.
        sinks: where snapshots go besides the loggers; a run file under `repflow-runs/` if None.
        blocks: see `repflow.monitor.find_residual_stream`.
        stream: see `repflow.monitor.find_residual_stream`.
        name: of the run.
        log_states: which states become scalars in the loggers: "auto", "all", or their numbers.
        mask: from a batch to the mask `[B, T]` of what the model makes of it, not 0 at tokens, where the model does not
            receive one under a name such as `attention_mask`: `mask=lambda batch: ~batch["is_pad"]`. Called for each
            forward that is measured, with the batch on the module's device.
        probe_batch: measure this batch every time instead of the training batches; see `repflow.monitor.Monitor`. It is
            given to the `forward` of the LightningModule, in the trainer's precision.
        process_group: the ranks that share a batch; see `repflow.monitor.Monitor`. A group, or a function that takes
            the Trainer and gives it when fitting starts, for groups that are made after the callback, as
            `lambda trainer: trainer.strategy.device_mesh["data_parallel"].get_group()`. It is called on every rank, and
            not at all where torch.distributed is not in use.
        sequence_group: the ranks that hold slices of the same sequences; given likewise.
        options: fields of `MonitorConfig`.

    Raises:
        TypeError: an option that does not exist, both a config and options, or a `mask` that cannot be called.
        ValueError: an option out of its range; when fitting starts, a model whose blocks are not found.
    """

    def __init__(
        self,
        config: MonitorConfig | None = None,
        *,
        sinks: AbstractSink | Sequence[AbstractSink] | None = None,
        blocks: str | Sequence[Module] | None = None,
        stream: str | None = None,
        name: str | None = None,
        log_states: StateChoice = "auto",
        mask: Callable[[Any], Tensor] | None = None,
        probe_batch: ProbeBatch | None = None,
        process_group: GivenGroup = None,
        sequence_group: GivenGroup = None,
        **options: Any,
    ) -> None:
        self._choices = Choices.checked(
            type(self).__name__,
            config,
            options,
            sinks=sinks,
            blocks=blocks,
            stream=stream,
            name=name,
            log_states=log_states,
            probe_batch=probe_batch,
            process_group=process_group,
            sequence_group=sequence_group,
        )
        if not (mask is None or callable(mask)):
            raise TypeError(
                f"`{type(self).__name__}`: expected mask as a function from a batch to its mask, got "
                f"{type(mask).__name__}; write mask=lambda batch: ..."
            )
        self._mask = mask
        self.config = self._choices.config
        self.monitor: Monitor | None = None
        """The engine, from the start of fitting on."""
        self._resumed: dict[str, Any] = {}  # the state of the run whose checkpoint is being continued
        self._open: AbstractContextManager[None] | None = None
        self._scalars = _CallbackMetricsSink()

    @property
    def state_key(self) -> str:
        """Tells several monitors of one trainer apart in checkpoints."""
        return self._generate_state_key(**self._choices.key())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks. `setup` would be too early: models may only be built after it."""
        self._close()
        self.monitor = None
        compiled = getattr(pl_module, "_compiler_ctx", None) is not None  # the trainer passes on what is inside
        if not (trainer.is_global_zero or self.config.reduce):
            self._choices.check(pl_module, trainer=trainer, compiled=compiled)
            return
        own = self._choices.own_sinks()
        if self._choices.sinks is None and getattr(trainer, "fast_dev_run", False):
            own = []
        self._scalars = _CallbackMetricsSink(trainer if trainer.world_size == 1 else None)
        run_file = run_file_of(own)
        loggers = LoggerSink(lambda: trainer.loggers, states=self._choices.log_states, run_file=run_file)
        self.monitor = self._choices.monitor(
            pl_module,
            [*own, loggers, self._scalars],
            trainer=trainer,
            compiled=compiled,
            name=self._resumed.get("name"),
        )
        self.monitor.load_state_dict(self._resumed.get("monitor", {}))
        self._resumed = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the optimizer step that this micro-batch belongs to."""
        if self.monitor is not None:
            mask = None if self._mask is None else partial(self._mask, batch)
            self._open = self.monitor.step(_optimizer_step(trainer), mask=mask)
            probe = self._choices.probe_batch is not None  # it runs here, in the precision of the training step
            with trainer.precision_plugin.forward_context() if probe else nullcontext():
                self._open.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the micro-batch, and publish the step with the last one of it."""
        if self.monitor is None or self._open is None:
            return
        self._open.__exit__(None, None, None)
        self._open = None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self.monitor.recording and isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning has divided the loss by the number of micro-batches.
            self.monitor.log(loss=loss.detach() * trainer.accumulate_grad_batches)
        if not _accumulates(trainer):
            self.monitor.publish()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Deliver what is in flight before other callbacks look at `callback_metrics`."""
        self._deliver(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Deliver what is in flight."""
        self._deliver(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop the step that was cut off and finish the files; no other hook follows an exception."""
        if self.monitor is not None:
            self.monitor.discard()
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish the files."""
        if stage == "fit":
            self._close()

    def state_dict(self) -> dict[str, Any]:
        """The name of the run, under which a resumed run goes on in the same file, and what raised alerts."""
        if self.monitor is None:
            return {"name": self._choices.name}
        return {"name": self.monitor.run.name, "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the run of the checkpoint."""
        self._resumed = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not take the running engine along."""
        return {**self.__dict__, "monitor": None, "_open": None, "_scalars": _CallbackMetricsSink()}

    def _deliver(self, trainer: Trainer) -> None:
        """Deliver what is in flight; with several ranks, give all of them the same `callback_metrics`."""
        if self.monitor is not None:
            self.monitor.wait()
        if trainer.world_size > 1:
            trainer.callback_metrics.update(trainer.strategy.broadcast(self._scalars.latest, src=0))

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
        self._open = None


class _CallbackMetricsSink(AbstractSink):
    """Puts every state's scalars where EarlyStopping and ModelCheckpoint look for them.

    With several ranks, which must all see the same, they only wait in `latest` until the ranks meet.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self._trainer = trainer
        self.latest: dict[str, Tensor] = {}

    def start(self, run: RunInfo) -> None:
        pass

    def write(self, snapshot: Snapshot) -> None:
        self.latest = {key: torch.tensor(value) for key, value in scalar_items(snapshot, "all").items()}
        if self._trainer is not None:
            self._trainer.callback_metrics.update(self.latest)

    def close(self) -> None:
        pass


def _optimizer_step(trainer: Trainer) -> int:
    """The step at which the trainer logs its own metrics: one per batch, however many optimizers step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _accumulates(trainer: Trainer) -> bool:
    """Whether more micro-batches of this optimizer step follow."""
    return trainer.fit_loop._should_accumulate()
