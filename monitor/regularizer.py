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

from repflow.monitor.block_state import as_returned, state_of, tensors_of
from repflow.monitor.delivery import Ready, copy_to_host
from repflow.monitor.injection import Injections
from repflow.monitor.masks import CallMasks, ToldMasks
from repflow.monitor.monitor import Monitor
from repflow.monitor.regularizer_checks import Term, check_choices, check_model, existing_layers, of_parallel
from repflow.monitor.residual_stream import ResidualStream, find_residual_stream
from repflow.monitor.strength import DualAscent, Strength, checked_number
from repflow.monitor.taps import Read, Taps, is_compiled, outside_graphs
from repflow.monitor.term import Sums, TrainedForward, term_gradient
from repflow.monitor.weakly import weakly

LossScale = float | Callable[[torch.device], Tensor | float]
"""What the loss has been multiplied with when backward runs, or a function that gives it, on a device."""
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
        found = find_residual_stream(model, blocks, stream=stream)
        self.layers = existing_layers(layers, found)
        self.blocks = tuple(found.blocks[layer - 1] for layer in self.layers)
        check_model(model, found)
        self._target, self._strength, self._term = float(target), strength, term
        self._loss_scale, self._monitor, self._room = loss_scale, monitor, max_documents
        self._group = process_group
        device = next((parameter.device for parameter in self.blocks[0].module.parameters()), torch.device("cpu"))
        self._step = 0
        self._multiplier = torch.full((len(self.layers),), self._first(), dtype=torch.float64, device=device)
        self._sums = Sums(len(self.layers), device)
        self._entry: tuple[int, CallMasks] | None = None
        self._current: TrainedForward | None = None
        self._pending: list[TrainedForward] = []
        self._overflow: tuple[Tensor, Ready | None] | None = None  # of the step before
        self.metrics: dict[str, Tensor] = {}
        """What the last step measured: similarity, strength and gradient ratio of each layer, on the device."""
        resident = compiled or is_compiled(model)
        self._taps, self._injections = Taps(resident=resident), Injections(resident=resident)
        try:
            self._tap(found, resident)
        except ValueError:
            self.remove()
            raise

    def follow(self, loss: Tensor, *, mask: Tensor | None = None) -> None:
        """Let the term be scaled as `loss` is from here to backward; for a loss that the model does not return.

        Args:
            loss: of all forwards since the last backward.
            mask: `[B, T]`, attention mask or document numbers, in place of the one that the model received.

        Raises:
            ValueError: a loss that is not one number with a gradient.
        """
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"`follow`: expected a loss of one number with a gradient, got {list(loss.shape)}")
        forwards = list(self._pending)
        for forward in forwards:
            forward.depth = -1
            if mask is not None:
                forward.masks = CallMasks(mask)
        loss.register_hook(functools.partial(_note, forwards))

    def step(self) -> dict[str, Tensor]:
        """End an optimizer step, on all ranks: λ moves, `metrics` are those of this step. Waits for the one before.

        Raises:
            RuntimeError: no backward has reached a layer since the last step, or documents were left out before.
        """
        if not self._sums.recorded:
            seen = "a training forward has run" if self._pending else "no training forward has run"
            raise RuntimeError(
                f"`RepresentationRegularizer`: expected a backward through '{self.blocks[0].name}' in each optimizer "
                f"step, but {seen} and no gradient has come back in step {self._step}; call `step` once for each "
                "optimizer step, and choose layers whose states carry a gradient"
            )
        self._check_overflow()
        similarity, ratio, left_out = self._sums.take(self._group)
        self._overflow = copy_to_host(left_out) if left_out.is_cuda else (left_out, None)
        self.metrics = {
            f"repflow/regularizer/{name}/state_{layer:02}": values[index]
            for name, values in (("similarity", similarity), ("strength", self._multiplier), ("gradient_ratio", ratio))
            for index, layer in enumerate(self.layers)
        }
        monitor = None if self._monitor is None else self._monitor()
        if monitor is not None:
            monitor.log(
                regularizer_similarity=similarity.nanmean(),
                regularizer_strength=self._multiplier.mean(),
                regularizer_gradient_ratio=ratio.nanmean(),
            )
        self._step += 1
        self._pending.clear()
        if isinstance(self._strength, DualAscent):
            self._multiplier = self._strength.update(self._multiplier, similarity, self._target)
        elif callable(self._strength):
            self._multiplier = torch.full_like(self._multiplier, self._first())
        return self.metrics

    @property
    def recorded(self) -> bool:
        """Whether a gradient has come back since the last step."""
        return self._sums.recorded > 0

    def remove(self) -> None:
        """Leave nothing on the model."""
        self._taps.remove()
        self._injections.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain values: the number of steps, and λ of each layer after the last one."""
        return {"step": self._step, "layers": list(self.layers), "strength": self._multiplier.tolist()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. A fixed or scheduled strength is the one that was given.

        Raises:
            ValueError: it is of other layers.
        """
        if list(state_dict["layers"]) != list(self.layers):
            raise ValueError(
                f"`RepresentationRegularizer`: expected the state of layers {list(self.layers)}, got that of "
                f"{list(state_dict['layers'])}; resume with the layers that the run began with"
            )
        self._step = int(state_dict["step"])
        if isinstance(self._strength, DualAscent):
            self._multiplier = self._multiplier.new_tensor(state_dict["strength"]).clamp(0, self._strength.maximum)
        else:
            self._multiplier = torch.full_like(self._multiplier, self._first())

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of what holds a regularizer has None there."""
        return type(None), ()

    def _first(self) -> float:
        """λ of the step that begins, where it does not depend on what was measured."""
        if isinstance(self._strength, DualAscent):
            return self._strength.start
        if callable(self._strength):
            return checked_number("RepresentationRegularizer", self._strength(self._step))
        return float(self._strength)

    def _tap(self, stream: ResidualStream, resident: bool) -> None:
        """Hooks on the model keep the regularizer alive: it acts until `remove`, whoever holds it."""
        for index, block in enumerate(self.blocks):
            select, push = functools.partial(tensors_of, block.reader), functools.partial(self._push, index)
            self._injections.on_exit(block.module, select, functools.partial(self._left, index), push)
        run = outside_graphs(_call, resident=resident)
        for depth, module in enumerate(stream.ancestors):
            receive = functools.partial(run, weakly(self._enter), depth)
            self._taps.on_masks(module, receive, decoder=stream.is_decoder)
        first = stream.blocks[0]
        self._taps.on_entry(first.module, first.reader.entry, functools.partial(run, weakly(self._begin)))
        self._taps.arm()
        for depth, module in enumerate(stream.ancestors if self._loss_scale is None else ()):
            follow, note = (functools.partial(call, depth) for call in (self._follow_own, self._note_in_graph))
            self._injections.on_loss(module, follow, note)

    def _enter(self, depth: int, read: Read[ToldMasks]) -> None:
        """A module that contains the blocks is called."""
        if not _in_backward():
            outer = self._entry[1] if self._entry is not None and self._entry[0] < depth else CallMasks()
            self._entry = depth, read()[1].within(outer)

    def _begin(self, read: Read[Tensor]) -> None:
        """The first block is called: a forward begins."""
        if _in_backward():
            return
        entry, self._entry = self._entry, None
        self._current = TrainedForward(CallMasks() if entry is None else entry[1], len(self.layers))
        if any(block.module.training for block in self.blocks) and read()[0]:
            self._pending.append(self._current)

    def _left(self, index: int, tensors: tuple[Tensor, ...]) -> object:
        """A chosen block has returned: the forward that it belongs to, or something else where only backward tells."""
        block = self.blocks[index]
        if any(hasattr(tensor, "placements") for tensor in tensors):
            raise ValueError(of_parallel(f"'{block.name}' returns a DTensor"))
        if not any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                f"`RepresentationRegularizer`: expected the state behind '{block.name}' to carry a gradient, but "
                "everything up to there is frozen: the term would train nothing; choose layers behind the first "
                "trained one"
            )
        if _in_backward() or self._current is None:
            return _UNKNOWN
        if self._current not in self._pending:  # it began without gradients, as a frozen part may
            self._pending.append(self._current)
        return self._current

    def _only_forward(self, index: int) -> TrainedForward:
        """The forward whose backward is running, where autograd cannot tell."""
        if len(self._pending) != 1:
            raise RuntimeError(
                f"`RepresentationRegularizer`: expected one forward between two backwards, got {len(self._pending)}: "
                f"which of them '{self.blocks[index].name}' belongs to cannot be told under torch.compile and "
                "reentrant checkpointing; call backward after each forward, run forwards that train nothing under "
                "torch.no_grad(), or take use_reentrant=False and no torch.compile"
            )
        return self._pending[0]

    def _follow_own(self, depth: int, loss: Tensor) -> None:
        """A module around the blocks returns a loss: that of the last forward."""
        if self._pending and not _in_backward():
            loss.register_hook(functools.partial(_note_own, self._pending[-1], depth))

    def _note_in_graph(self, depth: int, gradient: Tensor) -> None:
        """The gradient of the loss that a compiled module returns."""
        _note_own(self._only_forward(0), depth, gradient)

    def _push(
        self, index: int, forward: object, gradients: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The gradients with that of the term, which is the same for all tensors whose sum is the state."""
        owner = forward if isinstance(forward, TrainedForward) else self._only_forward(index)
        reader, device = self.blocks[index].reader, gradients[0].device
        weight = self._multiplier[index].to(device) * self._scale_of(owner, device)
        groups = owner.groups(state_of(reader, tensors), self._room, self._sums)
        result = term_gradient(
            state_of(reader, tensors), groups, weight, self._target, state_of(reader, gradients[:1]),
            contrastive=self._term == "contrastive", apart=len(gradients) > 1,
        )  # fmt: skip
        self._sums.add(index, result)
        owner.left -= 1
        if owner.left == 0 and owner in self._pending:
            self._pending.remove(owner)
        changed = as_returned(reader, result.gradient, gradients[0])
        if len(gradients) == 1:
            return (changed,)
        return tuple(gradient + changed.to(gradient.dtype) for gradient in gradients)

    def _scale_of(self, forward: TrainedForward, device: torch.device) -> Tensor | float:
        if forward.scale is not None:
            return forward.scale.to(device, torch.float64)
        if self._loss_scale is None:
            raise RuntimeError(
                "`RepresentationRegularizer`: expected the model to return the loss that backward begins with, and no "
                "gradient has come through one: the term must be scaled as the loss is, under accumulation and "
                "GradScaler; call `follow(loss)` before backward, or pass loss_scale= (1.0 if the loss is neither "
                "divided nor scaled)"
            )
        return self._loss_scale(device) if callable(self._loss_scale) else self._loss_scale

    def _check_overflow(self) -> None:
        """Of the step before, whose numbers have arrived by now, or come before those of this step."""
        if self._overflow is None:
            return
        number, ready = self._overflow
        if ready is not None:
            ready.synchronize()
        if left_out := int(number):
            raise RuntimeError(
                f"`RepresentationRegularizer`: expected at most {self._room} documents in a micro-batch beyond one "
                f"per row, and {left_out} more were left out of step {self._step - 1}; raise max_documents"
            )


def _note(forwards: list[TrainedForward], gradient: Tensor) -> None:
    for forward in forwards:
        forward.scale = gradient.detach().reshape(())


def _note_own(forward: TrainedForward, depth: int, gradient: Tensor) -> None:
    """The loss of the outermost module is the one, unless another is followed."""
    if depth < forward.depth:
        forward.depth = depth
        _note([forward], gradient)


def _call(call: Callable[..., None], *args: Any) -> None:
    call(*args)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
