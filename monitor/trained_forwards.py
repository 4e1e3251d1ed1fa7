"""Which forward a gradient belongs to, which tokens of it belong together, and what its loss is multiplied with."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repflow.monitor.masks import CallMasks, ToldMasks, misfit, token_groups
from repflow.monitor.term import Sums
from repflow.triton_kernels._dispatch import use_triton
from repflow.triton_kernels.groups import Groups, find_groups

LossScale = float | Callable[[torch.device], Tensor | float]
"""What the loss has been multiplied with when backward runs, or a function that gives it, on a device."""


@dataclass(eq=False)
class TrainedForward:
    """A forward whose backward is still to come."""

    number: int
    """Of the forwards that began, from 0."""
    masks: CallMasks
    shape: tuple[int, int]
    """(B, T) of its states."""
    outermost: int
    """Depth of the outermost module that was called around its blocks."""
    entered: int = -1
    """Position of the last block that was seen to be called."""
    returned: set[int] = field(default_factory=set)
    """The chosen layers whose gradient has come back."""
    scale: Tensor | None = None
    """The gradient of its loss, once that is known."""
    depth: int = 1 << 30
    """Of the module that returned that loss, from the outermost one; −1: it was given to `follow`."""
    _groups: Groups | Bool[Tensor, "B T"] | None = None
    _known: bool = False

    def tell(self, mask: Tensor) -> None:
        """Take `mask` in place of what the model received.

        Raises:
            ValueError: it is not of the states' shape.
        """
        rows, tokens = self.shape
        fits = isinstance(mask, Tensor) and (mask.numel() == tokens if rows == 1 else mask.shape == self.shape)
        if not fits:
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"`follow`: expected a mask of shape {[rows, tokens]} like the states of a forward since the last "
                f"backward, got {got}; call `discard()` where a forward's backward is skipped"
            )
        self.masks = CallMasks(mask)

    def groups(self, state: Float[Tensor, "B T D"], room: int, sums: Sums) -> Groups | Bool[Tensor, "B T"] | None:
        """Which tokens belong together. A GPU is not waited for: for an integer mask there is room for documents."""
        if not self._known:
            rows, tokens, _ = state.shape
            masks = self.masks.of_flat_tokens() if rows == 1 else self.masks
            try:
                if wrong := misfit(masks, tokens):
                    raise ValueError(f"expected a mask of the states, got {wrong}".rstrip(","))
                mask = token_groups(masks, rows, tokens)
            except ValueError as error:
                what = str(error).partition(";")[0]
                raise ValueError(
                    f"`RepresentationRegularizer`: {what} from the model's call; pass the right one: "
                    "follow(loss, mask=...)"
                ) from None
            if mask is not None and mask.is_floating_point():
                mask = mask > 0  # given to `follow`
            if mask is not None and mask.dtype != torch.bool:
                found = find_groups(mask, rows + room if use_triton(state) else None)
                if found.found is not None:
                    sums.leave_out(found.found - found.count)
                mask = found
            self._groups, self._known = mask, True
        groups = self._groups
        if isinstance(groups, Groups):
            return groups if groups.index.device == state.device else _moved(groups, state.device)
        return None if groups is None else groups.to(state.device)

    def scaled(self, given: LossScale | None, device: torch.device) -> Tensor | float:
        """What the loss has been multiplied with: as was seen, or else as it is `given`.

        Raises:
            RuntimeError: neither.
        """
        if self.scale is not None:
            return self.scale.to(device, torch.float64)
        if given is None:
            raise RuntimeError(
                "`RepresentationRegularizer`: expected the model to return the loss that backward begins with, and no "
                "gradient has come through one: the term must be scaled as the loss is, under accumulation and "
                "GradScaler; call `follow(loss)` before backward, or pass loss_scale= (1.0 if the loss is neither "
                "divided nor scaled)"
            )
        return given(device) if callable(given) else given


class TrainedForwards:
    """The forwards whose backward is still to come, in order."""

    def __init__(self) -> None:
        self.pending: list[TrainedForward] = []
        self.current: TrainedForward | None = None
        """The one whose blocks are being called; None once a module around them is called again."""
        self._begun = 0
        self._entry: tuple[int, CallMasks] | None = None
        self._around: dict[int, int] = {}  # how many forwards had begun when the module of that depth was called

    def enter(self, depth: int, told: ToldMasks) -> None:
        """A module that contains the blocks is called."""
        outer = self._entry[1] if self._entry is not None and self._entry[0] < depth else CallMasks()
        self._entry, self.current = (depth, told.within(outer)), None
        self._around = {other: begun for other, begun in self._around.items() if other < depth}
        self._around[depth] = self._begun

    def begin(self, position: int, shape: tuple[int, int], *, trains: bool) -> None:
        """A block is called: the first of a forward, where stochastic depth may leave out block 0, or a later one."""
        forward = self.current
        if forward is None or position <= forward.entered:
            entry, self._entry = self._entry, None
            masks, outermost = CallMasks() if entry is None else entry[1], min(self._around, default=0)
            forward = self.current = TrainedForward(self._begun, masks, shape, outermost)
            self._begun += 1
        forward.entered = position
        if trains and forward not in self.pending:  # one may begin without gradients, as a frozen part does
            self.pending.append(forward)

    def follow(self, loss: Tensor, mask: Tensor | None) -> None:
        """Take `loss` for that of all pending forwards, whatever the model returns."""
        forwards = list(self.pending)
        for forward in forwards if mask is not None else ():
            assert mask is not None
            forward.tell(mask)
        for forward in forwards:
            forward.depth = -1
        loss.register_hook(functools.partial(_note, forwards))

    def follow_own(self, depth: int, loss: Tensor, guessed: bool) -> None:
        """The module of that depth returns its loss: that of all forwards since it was called."""
        forwards = [forward for forward in self.pending if forward.number >= self._around.get(depth, 0)]
        if forwards:
            loss.register_hook(functools.partial(note_own, forwards, depth, guessed))

    def only(self, name: str) -> TrainedForward:
        """The forward whose backward is running at block `name`, where autograd cannot tell.

        Raises:
            RuntimeError: there are several, or none is left.
        """
        if len(self.pending) == 1:
            return self.pending[0]
        if not self.pending:
            raise RuntimeError(of_second_backward(name))
        raise RuntimeError(
            f"`RepresentationRegularizer`: expected one forward between two backwards, got {len(self.pending)}: "
            f"which of them '{name}' belongs to cannot be told under torch.compile and reentrant checkpointing; call "
            "backward after each forward, call `discard()` where a forward's backward is skipped, run forwards that "
            "train nothing under torch.no_grad(), or take use_reentrant=False and no torch.compile"
        )

    def returned(self, forward: TrainedForward, layer: int, of: int, name: str) -> None:
        """The gradient of a layer of the forward has come back, one of so many.

        Raises:
            RuntimeError: for the second time.
        """
        if layer in forward.returned:
            raise RuntimeError(of_second_backward(name))
        forward.returned.add(layer)
        if len(forward.returned) == of and forward in self.pending:
            self.pending.remove(forward)

    def discard(self) -> None:
        """Forget those that have begun: no backward will come."""
        self.pending.clear()
        self.current = None


def of_second_backward(name: str) -> str:
    """The error for a second backward through the same forward."""
    return (
        f"`RepresentationRegularizer`: expected one backward through '{name}' for each forward, got another one, as "
        "retain_graph=True allows (or one behind `step` or `discard`): it would add the term twice; add the losses up "
        "and call backward once, before `step`"
    )


def note_own(forwards: Sequence[TrainedForward], depth: int, guessed: bool, gradient: Tensor) -> None:
    """The loss of the outermost module is the one, unless another is followed.

    One that was guessed counts only where that module is the outermost one: further in it may be part of a loss, as
    that of a router is.
    """
    for forward in forwards:
        if depth < forward.depth and not (guessed and depth > forward.outermost):
            forward.depth = depth
            _note([forward], gradient)


def _note(forwards: Sequence[TrainedForward], gradient: Tensor) -> None:
    for forward in forwards:
        forward.scale = gradient.detach().reshape(())


def _moved(groups: Groups, device: torch.device) -> Groups:
    return Groups(groups.index.to(device), groups.count, groups.by_row, groups.valid.to(device))
