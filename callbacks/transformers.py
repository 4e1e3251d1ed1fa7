"""The Hugging Face callback: `Trainer(callbacks=[RepresentationMonitorCallback()])`."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.nn import Module

from repflow._imports import TRANSFORMERS, require
from repflow.callbacks._choices import Choices, GivenGroup, run_file_of
from repflow.callbacks._reporters import ReporterSink
from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.probe import ProbeBatch
from repflow.monitor.sinks import AbstractSink, WandbSink
from repflow.monitor.sinks._keys import StateChoice
from repflow.monitor.warning import warn

require("transformers")
if TYPE_CHECKING or TRANSFORMERS:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState


class RepresentationMonitorCallback(TrainerCallback, ExportableState):
    """Monitors the representations of the model that a `Trainer`, or a subclass of it, trains.

    ```python
    trainer = Trainer(..., callbacks=[RepresentationMonitorCallback(every_n_steps=50)])
    ```

    Snapshots go to a run file, and where the Trainer reports to: the W&B run that is open, over `repflow/step` and with
    `train/global_step`; the writer of its TensorBoard callback. The step of a snapshot is the Trainer's `global_step`
    during it, the number of optimizer steps behind the weights that were measured: 0 before the first one, and that of
    checkpoint-50 and of the evaluation at step 50 at 50. The loss kept with it is the one the Trainer logs for that
    optimizer step, at `global_step` + 1.

    A run that resumes from a checkpoint goes on in its file. Each other `train()` is a run of its own, if it has no
    `name`. When training raises the Trainer tells nobody: the hooks of a step that was cut off go, and the files are
    finished, when the same callback trains again, when it is no longer referred to, on `close()`, or at once with

    ```python
    with RepresentationMonitorCallback() as monitor:
        Trainer(..., callbacks=[monitor]).train()
    ```

    Args:
        config: what to measure. Its fields may be given as keywords instead.
        sinks: where snapshots go besides the reporters; a run file under `repflow-runs/` if None.
        blocks: see `repflow.monitor.find_residual_stream`.
        stream: see `repflow.monitor.find_residual_stream`.
        name: of the run; in a hyperparameter search that of the trial is added.
        log_states: which states become scalars in the reporters: "auto", "all", or their numbers.
        probe_batch: measure this batch every time instead of the training batches; see `repflow.monitor.Monitor`.
        process_group: the ranks that share a batch; see `repflow.monitor.Monitor`. A group, or a function that takes
            the Trainer and gives it when training starts, for groups that are made after the callback. It is called on
            every rank, and not at all where torch.distributed is not in use.
        sequence_group: the ranks that hold slices of the same sequences; given likewise, as
            `lambda trainer: trainer.accelerator.torch_device_mesh["cp"].get_group()`.
        options: fields of `MonitorConfig`.

    Raises:
        TypeError: an option that does not exist, or both a config and options.
        ValueError: an option out of its range; when training starts, a model whose blocks are not found.
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
        self.config = self._choices.config
        self.monitor: Monitor | None = None
        """The engine, from the start of training on."""
        self._trials = 0
        self._forget()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the blocks: the model is ready, wrapped, and about to be compiled if it is to be."""
        self.close()
        self.monitor = None
        saved = self._saved(args, state)
        model = kwargs["model"]
        training, compiled = _training(), args.torch_compile  # around the model that callbacks are shown
        if not (state.is_world_process_zero or self.config.reduce):
            self._choices.check(model, trainer=training(), compiled=compiled)
            return
        self._trainer = training
        own = self._choices.own_sinks()
        reporters = ReporterSink(
            _callbacks_of(self._trainer),
            self._choices.log_states,
            to_wandb=not any(isinstance(sink, WandbSink) for sink in own),
            run_file=run_file_of(own),
        )
        self.monitor = self._choices.monitor(
            model,
            [*own, reporters],
            trainer=training(),
            compiled=compiled,
            name=saved.get("name") or self._trial_name(state),
        )
        self.monitor.load_state_dict(saved.get("monitor", {}))
        self._finalizer = weakref.finalize(self, _abandon, self.monitor)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the optimizer step, before its first micro-batch."""
        if self.monitor is not None:
            self._cut_off()
            self._step = self.monitor.step(state.global_step)
            self._step.__enter__()
            self._loss = _summed_loss(self._trainer()) if self.monitor.recording else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close and publish it, after the optimizer has stepped; the Trainer then logs, evaluates and saves."""
        if self.monitor is None or self._step is None:
            return
        self._step.__exit__(None, None, None)
        self._step = None
        if self._loss is not None and (loss := _summed_loss(self._trainer())) is not None:
            self.monitor.log(loss=loss - self._loss)
        self.monitor.publish()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop a step that the epoch did not complete, and deliver what is in flight, before reporters close."""
        self._cut_off()
        if self.monitor is not None:
            self.monitor.wait()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the files."""
        if self.monitor is not None:
            self.monitor.close()
        if self._finalizer is not None:
            self._finalizer.detach()
        self._forget()

    def close(self) -> None:
        """Finish the files of a training that raised, and leave nothing on its model. May be called more than once."""
        self._cut_off()
        if self._finalizer is not None:
            self._finalizer()  # which runs once
        self._forget()

    def __enter__(self) -> "RepresentationMonitorCallback":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the arguments that JSON can hold, the run's name and alerts, and whose it is."""
        arguments, lost = self._choices.plain()
        saved = {"key": self._choices.key(), "lost": lost, "name": self._choices.name}
        if self.monitor is not None:
            saved |= {"name": self.monitor.run.name, "monitor": self.monitor.state_dict()}
        return {"args": arguments, "attributes": {"saved": saved}}

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not take the running engine along."""
        left = {"monitor": None, "_step": None, "_loss": None, "_finalizer": None, "_trainer": _nobody}
        return {**self.__dict__, **left}

    def _saved(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """What the checkpoint being resumed has kept of this monitor; nothing in a training that begins.

        It is read from `state`, since by default the Trainer restores no callbacks. Where it is told to, this one has
        been made of what `state` gave, and stands in the place of the user's.
        """
        kept = cast(dict[str, Any], state.stateful_callbacks)
        # The Trainer updates this entry when it saves, but a checkpoint of a training without monitor brings none.
        records = kept.setdefault(type(self).__name__, self.state())
        if not state.global_step:
            return {}  # they are of this callback itself
        every = [record["attributes"]["saved"] for record in (records if isinstance(records, list) else [records])]
        found = [saved for saved in every if saved["key"] == self._choices.key()]
        saved = found[-1] if found else {}
        if args.restore_callback_states_from_checkpoint and saved.get("lost"):
            warn(
                f"{type(self).__name__} was restored without {', '.join(saved['lost'])}, which no checkpoint holds; "
                "to keep them, leave restore_callback_states_from_checkpoint off: the run goes on all the same"
            )
        return saved

    def _trial_name(self, state: TrainerState) -> str | None:
        """The chosen name, with that of the trial in a hyperparameter search: each trial is a run of its own.

        A trial without a name has the number by which the search calls it, as Optuna does, or else its place.
        """
        if self._choices.name is None or not state.is_hyper_param_search:
            return self._choices.name
        number = getattr(getattr(self._trainer(), "_trial", None), "number", self._trials)
        self._trials += 1
        return f"{self._choices.name}-{state.trial_name or f'trial-{number}'}"

    def _cut_off(self) -> None:
        """Drop a step that has not ended."""
        if self._step is not None and self.monitor is not None:
            self.monitor.discard()
        self._step = None

    def _forget(self) -> None:
        """Let go of everything but the engine, which can still be asked for its last snapshot."""
        self._trainer: Any = _nobody
        self._step: AbstractContextManager[None] | None = None
        self._loss: Tensor | None = None  # what the Trainer had summed up when the step began
        self._finalizer: weakref.finalize | None = None


def _nobody() -> None:
    """In the place of a reference to a Trainer."""


def _abandon(monitor: Monitor) -> None:
    """End without waiting for other ranks, which may be gone."""
    monitor.discard()
    monitor.close()


def _training() -> Any:
    """Reference to the Trainer whose `train()` is calling, or `_nobody`.

    Events are not told whose they are: it is looked for up the stack. Without it, as under a loop that only borrows the
    callbacks of transformers, there is no loss and no TensorBoard.
    """
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return weakref.ref(trainer)
        frame = frame.f_back
    return _nobody


def _callbacks_of(training: Any) -> Callable[[], Iterable[object]]:
    """Gives the callbacks of a Trainer, as long as there is one."""

    def callbacks() -> Iterable[object]:
        trainer = training()
        return [] if trainer is None else trainer.callback_handler.callbacks

    return callbacks


def _summed_loss(trainer: Any) -> Tensor | None:
    """What a Trainer has summed up since it last logged: the losses of all micro-batches, each scaled for its step.

    The name is private. As the Trainer does, it passes over losses that are not finite, if `logging_nan_inf_filter`.
    """
    loss = getattr(trainer, "_tr_loss", None)
    return loss.detach().clone() if isinstance(loss, Tensor) and loss.numel() == 1 else None
