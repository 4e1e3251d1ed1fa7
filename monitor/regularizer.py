"""`Regularizer`: adds the gradient of a term on the similarity of tokens where blocks return, and drives its strength.

Unlike the monitor it changes what is trained. So nothing is caught here: every error reaches the training loop.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from repflow.monitor.block_state import as_returned, entry_of, state_of, tensors_of
from repflow.monitor.delivery import Ready, copy_to_host
from repflow.monitor.injection import Injections, owners_on
from repflow.monitor.masks import ToldMasks
from repflow.monitor.monitor import Monitor
from repflow.monitor.regularizer_checks import (
    Term,
    check_acting,
    check_choices,
    check_faults,
    check_model,
    check_recorded,
    check_stepped,
    check_trained,
    existing_layers,
    of_frozen,
    of_parallel,
)
from repflow.monitor.residual_stream import find_residual_stream
from repflow.monitor.strength import DualAscent, Multipliers, Strength
from repflow.monitor.taps import Read, Taps, is_compiled, outside_graphs
from repflow.monitor.term import StepMeasures, Sums, term_gradient
from repflow.monitor.trained_forwards import LossScale, TrainedForward, TrainedForwards, note_own
from repflow.monitor.warning import warn
from repflow.monitor.weakly import weakly

_UNKNOWN = object()
"""In the place of the forward that what backward runs again belongs to."""


class Regularizer:
    """Trains `model` with Σ_l λ_l · max(0, InterSim^(l) − target) beside its loss, of which the loop knows nothing.

    The term is that of each micro-batch, with the mean over its sequences or documents. It is scaled as the loss is:
    divided by the number of micro-batches, and multiplied by a GradScaler. That is seen in the gradient of the loss
    that the model returns, or of the one that `follow` is told, or it is given as `loss_scale`.

    Args:
        model: what is trained; it may be wrapped or compiled.
        target: the similarity above which the term acts.
        layers: the states h^(l) that it acts on, l = 1 … L; negative ones count from the last; "all".
        strength: λ of all layers: a number, a function of the step, or a controller that moves each layer's.
        term: "similarity"; or "contrastive", the mean over pairs of tokens of max(0, cos − target).
        loss_scale: see above; None: it is followed.
        blocks: see `find_residual_stream`.
        stream: see `find_residual_stream`.
        monitor: gives the Monitor that values are logged with, or None.
        max_documents: room for so many documents of a micro-batch beyond one per row, where masks are of integers.
        process_group: the ranks that share a batch; the default group if None.
        compiled: whether the model is compiled where that cannot be seen.

    Raises:
        TypeError: a strength or layers of another type.
        ValueError: layers that do not exist, a target outside [−1, 1], blocks that are shared, or a model whose tokens
            are spread over ranks.
    """

    def __init__(
        self,
        model: Module,
        *,
        target: float,
        layers: Sequence[int] | Literal["all"],
        strength: Strength,
        term: Term = "similarity",
        loss_scale: LossScale | None = None,
        blocks: str | Sequence[Module] | None = None,
        stream: str | None = None,
        monitor: Callable[[], Monitor | None] | None = None,
        max_documents: int = 64,
        process_group: "dist.ProcessGroup | None" = None,
        compiled: bool = False,
    ) -> None:
        check_choices(type(self).__name__, target, layers, strength, term)
        self._stream = find_residual_stream(model, blocks, stream=stream)
        self.layers = existing_layers(layers, self._stream)
        self.blocks = tuple(self._stream.blocks[layer - 1] for layer in self.layers)
        check_model(model, self._stream)
        self._target, self._term, self._label = float(target), term, stream
        self._loss_scale, self._monitor = loss_scale, monitor
        self._room, self._group = max_documents, process_group
        device = next((parameter.device for parameter in self.blocks[0].module.parameters()), torch.device("cpu"))
        limits = strength.limits(target, term) if isinstance(strength, DualAscent) else (0.0, 0.0)
        self.multipliers = Multipliers(strength, self.layers, limits, device)
        self._sums, self._forwards = Sums(len(self.layers), device), TrainedForwards()
        self._faults: tuple[Tensor, Ready | None] | None = None  # of the step before
        self._done, self._replaced = 0, False
        self._idle = [0] * len(self.layers)  # steps running in which a layer has not acted
        self._unchecked: Module | None = model  # until the first training forward
        self.metrics: dict[str, Tensor] = {}
        """What the last step measured: similarity, value, λ and gradient ratio of each layer, on the device."""
        resident = compiled or is_compiled(model)
        self._taps, self._injections = Taps(resident=resident), Injections(resident=resident)
        self._take_over()
        self._tap(resident)

    def follow(self, loss: Tensor, *, mask: Tensor | None = None) -> None:
        """Let the term be scaled as `loss` is from here to backward; for a loss that the model does not return.

        Args:
            loss: of all forwards since the last backward.
            mask: `[B, T]`, attention mask or document numbers, in place of the one that the model received.

        Raises:
            ValueError: a loss that is not one number with a gradient, or a mask of another shape than the states.
        """
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"`follow`: expected a loss of one number with a gradient, got {list(loss.shape)}")
        self._forwards.follow(loss, mask)

    def discard(self) -> None:
        """Forget the forwards that have begun: no backward will come for them."""
        self._forwards.discard()

    def step(self) -> dict[str, Tensor]:
        """End an optimizer step, on all ranks: λ moves, `metrics` are those of this step. Waits for the one before.

        Raises:
            RuntimeError: no backward has reached a layer since the last step, or one of the layers in none of the last
                twenty; documents were left out, or a loss was multiplied with a negative number, in this step or, on a
                GPU, in the one before; or another regularizer of the model is not stepped.
        """
        step, acted = self.multipliers.step, self._sums.recorded
        forward = "a training forward has run" if self._forwards.pending else "no training forward has run"
        check_recorded(acted, step, self.blocks[0], forward, replaced=self._replaced)
        self._idle = [0 if count else idle + 1 for count, idle in zip(acted, self._idle, strict=True)]
        check_acting(self._idle, self.blocks)
        check_stepped((o.layers for o in self._attached() if o._done < self._done), self._stream.name)
        self._check_faults(step - 1)
        measured = self._sums.take(self._group)
        self._faults = copy_to_host(measured.faults) if measured.faults.is_cuda else (measured.faults, None)
        if not measured.faults.is_cuda:
            self._check_faults(step)
        self.metrics = self._named(measured)
        self._done += 1
        self._forwards.pending.clear()
        self.multipliers.move(measured.similarity if self._term == "similarity" else measured.value)
        return self.metrics

    @property
    def recorded(self) -> bool:
        """Whether a gradient has come back since the last step."""
        return any(self._sums.recorded)

    def remove(self) -> None:
        """Leave nothing on the model."""
        self._taps.remove()
        self._injections.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain values: the number of steps, and λ of each layer after the last one."""
        return self.multipliers.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, which must be of the same layers."""
        self.multipliers.load_state_dict(state_dict)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of what holds a regularizer has None there."""
        return type(None), ()

    def _named(self, measured: StepMeasures) -> dict[str, Tensor]:
        """What a step measured under the keys of `metrics`; their means over layers go to the monitor."""
        found = {
            "similarity": measured.similarity,
            "value": measured.value,
            "strength": self.multipliers.values,
            "gradient_ratio": measured.ratio,
        }
        label = [] if self._label is None else [self._label]
        monitor = None if self._monitor is None else self._monitor()
        if monitor is not None:
            means = {"_".join(["regularizer", *label, name]): values.nanmean() for name, values in found.items()}
            monitor.log(**means)
        return {
            "/".join(["repflow/regularizer", *label, name, f"state_{layer:02}"]): values[index]
            for name, values in found.items()
            for index, layer in enumerate(self.layers)
        }

    def _take_over(self) -> None:
        """Others on the same stream go, as those of a cell that is run again: they act, and nobody steps them.

        Not those of other layers that have not made a step: they are of the training that is about to begin.
        """
        for other in self._attached():
            if other._done or set(other.layers) & set(self.layers):
                other._replaced = True
                other.remove()
                warn(
                    f"replaced the regularizer of layers {list(other.layers)} that was still attached to "
                    f"'{self._stream.name}'; call its `detach` first"
                )

    def _attached(self) -> list["Regularizer"]:
        """All that act on the same stream."""
        found = owners_on(block.module for block in self._stream.blocks)
        return [owner for owner in found if isinstance(owner, Regularizer)]

    def _tap(self, resident: bool) -> None:
        """Hooks on the model keep the regularizer alive: it acts until `remove`, whoever holds it."""
        for index, block in enumerate(self.blocks):
            select, push = functools.partial(tensors_of, block.reader), functools.partial(self._push, index)
            self._injections.on_exit(block.module, self, select, functools.partial(self._left, index), push)
        run = outside_graphs(_call, resident=resident)
        for depth, module in enumerate(self._stream.ancestors):
            receive = functools.partial(run, weakly(self._enter), depth)
            self._taps.on_masks(module, receive, decoder=self._stream.is_decoder)
        for block in dict.fromkeys([self._stream.blocks[0], *self.blocks]):
            begin = functools.partial(run, weakly(self._begin), block.index)
            self._taps.on_entry(block.module, entry_of(block.reader), begin)
        self._taps.arm()
        for depth, module in enumerate(self._stream.ancestors if self._loss_scale is None else ()):
            follow, note = (functools.partial(call, depth) for call in (self._follow_own, self._note_in_graph))
            self._injections.on_loss(module, follow, note)

    def _enter(self, depth: int, read: Read[ToldMasks]) -> None:
        """A module that contains the blocks is called."""
        if not _in_backward():
            self._forwards.enter(depth, read()[1])

    def _begin(self, position: int, read: Read[Tensor]) -> None:
        """The first block is called, or a chosen one."""
        if _in_backward():
            return
        grad, state = read()
        trains = grad and any(block.module.training for block in self.blocks)
        if trains and self._unchecked is not None:
            check_trained(self._unchecked, self._stream, self.layers[0])
            self._unchecked = None
        self._forwards.begin(position, (1 if state.ndim == 2 else len(state), state.shape[-2]), trains=trains)

    def _left(self, index: int, tensors: tuple[Tensor, ...]) -> object:
        """A chosen block has returned: the forward that it belongs to, or something else where only backward tells."""
        block = self.blocks[index]
        if any(hasattr(tensor, "placements") for tensor in tensors):
            raise ValueError(of_parallel(f"'{block.name}' returns a DTensor"))
        if not any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(of_frozen(block.name))
        return _UNKNOWN if _in_backward() else self._forwards.current or _UNKNOWN

    def _follow_own(self, depth: int, loss: Tensor, guessed: bool) -> None:
        """A module around the blocks returns a loss."""
        if not _in_backward():
            self._forwards.follow_own(depth, loss, guessed)

    def _note_in_graph(self, depth: int, guessed: bool, gradient: Tensor) -> None:
        """The gradient of the loss that a compiled module returns."""
        note_own([self._forwards.only(self.blocks[0].name)], depth, guessed, gradient)

    def _push(
        self, index: int, forward: object, gradients: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The gradients with that of the term, which is the same for all tensors whose sum is the state."""
        block, device = self.blocks[index], gradients[0].device
        owner = forward if isinstance(forward, TrainedForward) else self._forwards.only(block.name)
        scale = owner.scaled(self._loss_scale, device)
        if not owner.returned:
            self._sums.note_scale(scale)
        self._forwards.returned(owner, index, len(self.layers), block.name)
        groups = owner.groups(state_of(block.reader, tensors), self._room, self._sums)
        result = term_gradient(
            state_of(block.reader, tensors), groups, self.multipliers.values[index].to(device) * scale, self._target,
            state_of(block.reader, gradients[:1]), contrastive=self._term == "contrastive", apart=len(gradients) > 1,
        )  # fmt: skip
        self._sums.add(index, result)
        changed = as_returned(block.reader, result.gradient, gradients[0])
        if len(gradients) == 1:
            return (changed,)
        return tuple(gradient + changed.to(gradient.dtype) for gradient in gradients)

    def _check_faults(self, step: int) -> None:
        """Of the step before, whose numbers have arrived by now, or come before those of this step."""
        if self._faults is not None:
            (numbers, ready), self._faults = self._faults, None
            if ready is not None:
                ready.synchronize()
            check_faults(numbers.tolist(), step, self._room)


def _call(call: Callable[..., None], *args: Any) -> None:
    call(*args)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
