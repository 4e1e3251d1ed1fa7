"""The callback that changes what is trained, for Lightning, the Hugging Face Trainer, and a loop of one's own."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import Module

from repflow._imports import LIGHTNING, PYTORCH_LIGHTNING, TRANSFORMERS
from repflow.callbacks._records import path_of, record_of, state_in
from repflow.monitor import Monitor
from repflow.monitor.regularizer import Regularizer
from repflow.monitor.regularizer_checks import Term, check_choices, chosen_layers
from repflow.monitor.strength import DualAscent, Multipliers, Strength
from repflow.monitor.trained_forwards import LossScale

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    Base = object
else:
    # Each framework wants an object of its own class; what is not installed cannot ask for one.
    _NAMES = {"lightning.pytorch": LIGHTNING, "pytorch_lightning": PYTORCH_LIGHTNING}
    _BASES = [import_module(name).Callback for name, found in _NAMES.items() if found]
    if TRANSFORMERS:
        _CALLBACKS = import_module("transformers.trainer_callback")
        _BASES += [_CALLBACKS.TrainerCallback, _CALLBACKS.ExportableState]
    Base = type("Base", tuple(_BASES), {})
    LightningModule = Trainer = Any


_CONTROLLED = DualAscent()


class RepresentationRegularizer(Base):
    """Trains a model with λ · max(0, InterSim^(l) − target) on chosen layers beside its loss.

    ```python
    Trainer(callbacks=[RepresentationRegularizer(target=0.4, layers=[2, 3])])  # of Lightning or Hugging Face
    ```

    ```python
    regularizer = RepresentationRegularizer(target=0.4, layers=[2, 3])  # in a loop of one's own
    regularizer.attach(model)
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step(); optimizer.zero_grad()
        regularizer.step()
    regularizer.detach()
    ```

    The term's gradient is added where a block's gradient arrives: loss, outputs and training step stay as they are. It
    is the mean over micro-batches and ranks, and is scaled as the loss is by accumulation and a GradScaler. A loop of
    one's own whose model returns no loss says `regularizer.follow(loss)` before backward, or passes `loss_scale`.

    For each layer, `repflow/regularizer/similarity/state_02`, `…/value/…` (the term without λ), `…/strength/…` (λ) and
    `…/gradient_ratio/…` (‖added gradient‖/‖gradient that arrives‖ there, of the loss and the terms of later layers) are
    logged by the trainer, and are in `metrics`. With a `monitor`, their means over layers are in its snapshots. Where
    `stream` is given it is part of the names, as in `repflow/regularizer/encoder/value/state_02`.

    Unlike a monitor it fails loudly: it changes the objective. `attach` replaces, with a warning, what an earlier
    training left on the same blocks; several regularizers of one training act on different layers.

    Args:
        target: the similarity above which the term acts, in [−1, 1].
        layers: the states h^(l) it acts on, l = 1 … L, numbered as those of a monitor; negative ones count from the
            last; or "all".
        strength: λ: a number, a function of the optimizer step, or a `DualAscent` that moves the λ of each layer, as
            the default does.
        term: "similarity"; or "contrastive", the mean over pairs of tokens of max(0, cos − target), which takes n²; a
            `DualAscent` then follows that value.
        loss_scale: for a loop of one's own: what its loss is multiplied with before backward, such as 1/4 for the mean
            over four micro-batches; None: it is seen.
        blocks: see `repflow.monitor.find_residual_stream`.
        stream: see `repflow.monitor.find_residual_stream`.
        monitor: a `Monitor`, or the monitoring callback of the same trainer.
        max_documents: room for so many documents of a micro-batch beyond one per row, where masks are of integers.
        process_group: the ranks that share a batch; the default group if None.

    Raises:
        TypeError: a strength, layers or a target of another type.
        ValueError: a target outside [−1, 1]; when training starts, layers that do not exist, and models or ways of
            training that are not supported.
    """

    def __init__(
        self,
        target: float,
        layers: Sequence[int] | Literal["all"],
        *,
        strength: Strength = _CONTROLLED,
        term: Term = "similarity",
        loss_scale: LossScale | None = None,
        blocks: str | Sequence[Module] | None = None,
        stream: str | None = None,
        monitor: object = None,
        max_documents: int = 64,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ) -> None:
        check_choices(type(self).__name__, target, layers, strength, term)
        self._options: dict[str, Any] = {
            "target": float(target), "layers": chosen_layers(type(self).__name__, layers), "strength": strength,
            "term": term, "blocks": blocks, "stream": stream, "max_documents": max_documents,
            "process_group": process_group,
        }  # fmt: skip
        self._loss_scale, self._monitor = loss_scale, monitor
        self._engine: Regularizer | None = None
        self._resumed: dict[str, Any] = {}  # what to begin with
        self._ended: Multipliers | None = None  # of what was detached last
        self._metrics: dict[str, Tensor] = {}  # likewise
        self._trainer: Any = None
        self._backwards = 0  # of Lightning, since the last optimizer step

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What the last optimizer step measured, on its device; also after training."""
        return self._metrics if self._engine is None else self._engine.metrics

    def attach(self, model: Module) -> "RepresentationRegularizer":
        """Begin to act on `model`: before the first step, and after it was compiled or wrapped.

        Attached again, to a model with the same layers, it goes on with the λ that it had.

        Raises:
            ValueError: layers that do not exist, or a model that is not supported.
        """
        self._attach(model, self._loss_scale, again=True)
        return self

    def follow(self, loss: Tensor, *, mask: Tensor | None = None) -> None:
        """Scale the term as this loss is until backward; for a loss that the model does not return itself.

        Args:
            loss: of all forwards since the last backward.
            mask: `[B, T]`, attention mask or document numbers, in place of the one that the model received.

        Raises:
            ValueError: a loss that is not one number with a gradient, or a mask of another shape than the states.
            RuntimeError: not attached.
        """
        self._attached().follow(loss, mask=mask)

    def discard(self) -> None:
        """Forget the forwards that have begun, where their backward is skipped under torch.compile or checkpointing."""
        self._attached().discard()

    def step(self) -> None:
        """End an optimizer step, on all ranks: λ moves. Waits for no more than the step before.

        Raises:
            RuntimeError: not attached; no gradient has come back since the last step, or through one of the layers in
                none of the last twenty; a loss was multiplied with a negative number, or documents were left out.
        """
        self._attached().step()

    def detach(self) -> None:
        """Leave the model as it was. May be called more than once, and asks no device, which may have failed."""
        if self._engine is not None:
            self._ended, self._metrics = self._engine.multipliers, self._engine.metrics
            self._engine.remove()
        self._engine = self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain values: the number of steps, and λ of each layer."""
        if self._engine is not None:
            return self._engine.state_dict()
        return dict(self._resumed) if self._resumed or self._ended is None else self._ended.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`: at the next `attach`, or at once."""
        if self._engine is None:
            self._resumed = dict(state_dict)
        elif state_dict:
            self._engine.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not take what acts on the model along."""
        return {**self.__dict__, "_engine": None, "_trainer": None}

    # Lightning

    @property
    def state_key(self) -> str:
        """Tells several regularizers of one trainer apart in checkpoints."""
        own = {name: self._options[name] for name in ("layers", "stream")}
        return f"{type(self).__qualname__}{ {**own, 'blocks': path_of(self._options['blocks'])} }"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers. `setup` would be too early: models may only be built after it."""
        from repflow.callbacks._loss_scales import lightning_scale

        scale = self._loss_scale if self._loss_scale is not None else lightning_scale(trainer, pl_module)
        compiled = getattr(pl_module, "_compiler_ctx", None) is not None  # the trainer passes on what is inside
        self._backwards = 0
        self._attach(pl_module, scale, compiled=compiled, again=trainer.global_step > 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Forwards of the batch before are over, also where `training_step` returned None, without a backward."""
        if pl_module.automatic_optimization:
            self._attached().discard()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """A batch has a loss."""
        self._backwards += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        """End the step: all micro-batches have been through backward."""
        engine = self._attached()
        # Without a backward every batch of the step was skipped. By hand, optimizers of other models step, too.
        ends = self._backwards > 0 if pl_module.automatic_optimization else engine.recorded
        self._backwards = 0
        if ends:
            pl_module.log_dict(engine.step())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was. Checkpoints that are written because of the exception still have λ."""
        self.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        if stage == "fit":
            self.detach()

    # Hugging Face

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the layers: the model is ready, wrapped, and about to be compiled if it is to be."""
        from repflow.callbacks._loss_scales import transformers_scale
        from repflow.callbacks.transformers import _training

        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                f"`{type(self).__name__}`: expected restore_callback_states_from_checkpoint=False, since a checkpoint "
                "cannot hold all of its choices; λ is resumed all the same"
            )
        training = _training()
        scale = self._loss_scale if self._loss_scale is not None else transformers_scale(training)
        engine = self._attach(kwargs["model"], scale, compiled=bool(args.torch_compile))
        self._trainer = training
        # The Trainer adds to this entry when it saves, but a checkpoint of a training without it brings none.
        records = cast(dict[str, Any], state.stateful_callbacks).setdefault(type(self).__name__, [])
        if state.global_step:
            self._resume(lambda: state_in(records, type(self).__name__, self._options, engine.layers))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step: all micro-batches have been through backward."""
        self._attached().step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log, when the Trainer does."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None and control.should_log:
            trainer.log({key: float(value) for key, value in self.metrics.items()})
            control.should_log = True  # the Trainer's own values are still to come

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the model as it was. Lightning has a hook of this name too, and calls `teardown` after it."""
        self.detach()

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer keeps."""
        return record_of(self._options, self.state_dict())

    def _attach(
        self, model: Module, loss_scale: LossScale | None, *, compiled: bool = False, again: bool = False
    ) -> Regularizer:
        self.detach()
        monitor: Callable[[], Monitor | None] | None = None if self._monitor is None else self._found_monitor
        self._engine = Regularizer(model, loss_scale=loss_scale, monitor=monitor, compiled=compiled, **self._options)
        if again and self._ended is not None and self._ended.layers == self._engine.layers:
            self._engine.load_state_dict(self._ended.state_dict())
        self._resume(lambda: self._resumed)
        self._resumed, self._metrics = {}, {}
        return self._engine

    def _resume(self, find: Callable[[], Mapping[str, Any]]) -> None:
        """Go on from what is found, if anything; after an error nothing stays on the model."""
        try:
            self.load_state_dict(find())
        except ValueError:
            self.detach()
            raise

    def _found_monitor(self) -> Monitor | None:
        """The Monitor that was given, or that of the callback that was."""
        found = getattr(self._monitor, "monitor", self._monitor)
        return found if isinstance(found, Monitor) else None

    def _attached(self) -> Regularizer:
        if self._engine is None:
            raise RuntimeError(
                f"`{type(self).__name__}`: expected to be attached to a model; call `attach(model)` first"
            )
        return self._engine
