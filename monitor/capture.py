"""From hooks to one buffer: copies of the sampled sequences and tokens of h^(0..L), for every training forward."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from repflow.monitor.buffer import CaptureBuffer
from repflow.monitor.chain import Chain
from repflow.monitor.masks import CallMasks, MaskReader, token_groups
from repflow.monitor.residual_stream import ResidualStream
from repflow.monitor.sampling import Selection


@dataclass(frozen=True, eq=False)
class CapturedForward:
    """The states of one micro-batch, valid until the next forward begins."""

    states: Tensor
    """`[S, R, K, D]`: R sequences and K tokens of each, chosen by `selection`."""
    mask: Tensor | None
    """`[B, T]` of the whole micro-batch, as the model received it, or as it was given."""
    selection: Selection
    """Which rows and tokens of the micro-batch `states` holds."""
    shape: tuple[int, int]
    """(B, T) of the whole micro-batch."""


class CaptureError(RuntimeError):
    """The states of a forward cannot be captured; the message names the layer and the remedy."""


@dataclass(eq=False)
class _Entry:
    """What was seen on the way in: the innermost call of a module that contains the blocks."""

    depth: int
    grad: bool
    training: bool
    masks: CallMasks = field(default_factory=CallMasks)


@dataclass(eq=False)
class Recording:
    """A forward that is being recorded."""

    view: Tensor
    states: tuple[Tensor, ...]
    """`view` by state: indexing it in every hook would cost more."""
    selections: dict[torch.device, Selection]
    shape: tuple[int, int, int]
    """(B, T, D) of every state."""
    flat_tokens: bool
    mask: Tensor | None
    filled: int = 0
    """States so far: block `filled` - 1 is running."""

    def selection(self, device: torch.device) -> Selection:
        """What is kept of the forward, on `device`."""
        if device not in self.selections:
            self.selections[device] = self.selections[self.view.device].to(device)
        return self.selections[device]


@dataclass(eq=False)
class _Hook:
    """A hook that stays with its module: copying or pickling a hooked model must not take the monitor along."""

    call: Callable[..., None] | None

    def __call__(self, *args: Any) -> None:
        # A compiler that traces the model must find nothing here to trace.
        if self.call is not None and not torch.compiler.is_compiling():
            self.call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook(None)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[None]]:
        return _Hook, (None,)


@dataclass(eq=False)
class Capture:
    """Hooks on a stream that are there only between `arm` and `disarm`.

    Recorded is each forward that begins with gradients enabled and the model in training mode. Not recorded:
    evaluation, `generate()`, forwards under no_grad, and what activation checkpointing recomputes during backward.
    `ignored` counts the forwards left out.
    """

    stream: ResidualStream
    final_norm: bool
    """Read h^(L) after the final norm."""
    buffer: CaptureBuffer
    choose: Callable[[tuple[int, int], Tensor], Selection]
    """From (B, T) and the first state to what is kept of this forward."""
    on_forward: Callable[[CapturedForward], None]
    """Called at the end of each recorded forward, inside the last hook."""
    run: Callable[..., None]
    """Calls every hook, its first argument, with the others: must let no exception out."""
    taps: Callable[[], Iterable[tuple[Module, Callable[[Recording, Tensor], None]]]] = tuple
    """Modules inside of blocks, and what to call with the recorded forward and what the module returned."""
    ignored: Counter[str] = field(default_factory=Counter)
    broken: str | None = None
    """How the chain of blocks broke since `arm`: those forwards were left out."""
    _chain: Chain = field(init=False)
    _handles: list[RemovableHandle] = field(default_factory=list)
    _entry: _Entry | None = None
    _forward: Recording | None = None
    _mask: Tensor | None = None

    def __post_init__(self) -> None:
        self._chain = Chain(self.stream)

    def arm(self, mask: Tensor | None) -> None:
        """Register the hooks. `mask` replaces the masks that the model receives."""
        self.disarm()
        self.ignored.clear()
        self.broken = None
        self._mask = mask
        for depth, module in enumerate(self.stream.ancestors):
            hook = self._hook(self._enter, depth, MaskReader(module))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        first = self.stream.blocks[0].module
        self._handles.append(first.register_forward_pre_hook(self._hook(self._begin), with_kwargs=True))
        indices: dict[Module, list[int]] = {}
        for block in self.stream.blocks[: -1 if self.final_norm else None]:
            indices.setdefault(block.module, []).append(block.index)
        if not self._chain.verified:
            for module in dict.fromkeys(block.module for block in self.stream.blocks[1:]):
                hook = self._hook(self._follow)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for module, owned in indices.items():
            self._handles.append(module.register_forward_hook(self._hook(self._leave, owned)))
        if self.final_norm and self.stream.final_norm is not None:
            hook = self._hook(self._leave, [len(self.stream) - 1])
            self._handles.append(self.stream.final_norm.register_forward_hook(hook))
        for module, read in self.taps():
            self._handles.append(module.register_forward_hook(self._hook(self._tap, read)))

    def disarm(self) -> None:
        """Remove the hooks. A forward that is under way is dropped."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._forward is not None:
            self._count_incomplete(self._forward)
        self._chain.end()
        self._entry = self._forward = self._mask = None

    def _hook(self, call: Callable[..., None], *args: Any) -> _Hook:
        return _Hook(functools.partial(self.run, call, *args))

    def _enter(
        self, depth: int, read: MaskReader, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A module that contains the blocks is called: remember the mode and the masks."""
        if _in_backward():
            return
        inside = self._entry is not None and self._entry.depth < depth
        outer = self._entry.masks if inside and self._entry is not None else CallMasks()
        self._entry = _Entry(depth, torch.is_grad_enabled(), module.training, read(args, kwargs, outer))

    def _begin(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first block is called: decide whether to record, and take h^(0)."""
        if _in_backward() or self._runs_again(module):
            return
        entry, self._entry = self._entry or _Entry(0, torch.is_grad_enabled(), module.training), None
        if self._forward is not None:
            self._count_incomplete(self._forward)
            self._forward = None
        if not entry.grad:
            self.ignored["forwards without gradients"] += 1
        elif not entry.training:
            self.ignored["forwards in evaluation mode"] += 1
        else:
            block = self.stream.blocks[0]
            state = block.reader.entry(args, kwargs).detach()
            if not self._chain.verified:
                self._chain.begin(state)
            masks = CallMasks(self._mask) if self._mask is not None else entry.masks
            self._forward = self._start(state, masks)
            if self._forward is not None:
                self._store(self._forward, state)

    def _leave(self, owned: list[int], module: Module, args: tuple[Any, ...], output: Any) -> None:
        """Block l returns: take h^(l+1).

        `owned` are the positions of this module in the stream, several if it is shared.
        """
        forward = self._forward
        if forward is None or _in_backward():
            return
        index = forward.filled - 1
        if index not in owned:  # also what skips a block at random, as LayerDrop does
            self._forward = None
            what = f"'{self._name(owned[0])}' where '{self._name(index)}' was expected"
            self.ignored[f"forwards that ran {what}"] += 1
            return
        state = self.stream.blocks[index].reader.exit(output).detach()
        if not self._chain.verified:
            self._chain.left(index, state)
        self._store(forward, state)
        if forward.filled == len(self.stream) + 1:
            self._forward = None
            selection = forward.selection(forward.view.device)
            self.on_forward(CapturedForward(forward.view, forward.mask, selection, forward.shape[:2]))

    def _tap(self, read: Callable[..., None], module: Module, args: tuple[Any, ...], output: Any) -> None:
        if self._forward is not None and not _in_backward():
            read(self._forward, output)

    def _follow(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block but the first is called: it must take what the one before it returned."""
        forward = self._forward
        index = 0 if forward is None else forward.filled - 1
        if self._chain.verified or index == 0 or self.stream.blocks[index].module is not module or _in_backward():
            return  # blocks in another order are told when they return
        state = self.stream.blocks[index].reader.entry(args, kwargs).detach()
        if broken := self._chain.broken(index, state):
            self._forward = None
            self.broken = broken
            self.ignored[f"forwards in which {broken}"] += 1

    def _count_incomplete(self, forward: Recording) -> None:
        what = "did not pass through all blocks"
        if self.final_norm and forward.filled == len(self.stream):
            what = 'did not call the final norm, as where it is fused with a sum: use states="residual"'
        self.ignored[f"forwards that {what}"] += 1

    def _start(self, state: Tensor, masks: CallMasks) -> Recording | None:
        flat_tokens = state.ndim == 2
        if flat_tokens:
            state = state.unsqueeze(0)
            masks = CallMasks(*(mask.reshape(1, -1) if mask is not None else None for mask in masks))
        if state.ndim != 3:
            raise CaptureError(
                f"expected states of shape [B, T, D], got {list(state.shape)} at the input of '{self._name(0)}'; "
                "pass the blocks of a stream of tokens, blocks=[...]"
            )
        rows, tokens, features = state.shape
        if rows * tokens == 0:
            self.ignored["forwards without a token"] += 1
            return None
        mask = token_groups(masks, rows, tokens)
        selection = self.choose((rows, tokens), state).to(state.device)
        view = self.buffer.view((len(self.stream) + 1, *selection.shape, features), state)
        return Recording(view, view.unbind(), {state.device: selection}, (rows, tokens, features), flat_tokens, mask)

    def _store(self, forward: Recording, state: Tensor) -> None:
        if forward.flat_tokens:
            state = state.unsqueeze(0)
        if state.shape != forward.shape:
            raise CaptureError(
                f"expected every state to be {list(forward.shape)} like the first, got {list(state.shape)} from "
                f"'{self._name(forward.filled - 1)}'; repflow follows a stream of one width: "
                "pass the part of the model that has it, blocks=[...]"
            )
        if state.dtype != forward.view.dtype and not self._widen(forward, state.dtype):
            return
        forward.selection(state.device).copy_into(forward.states[forward.filled], state)
        forward.filled += 1

    def _widen(self, forward: Recording, dtype: torch.dtype) -> bool:
        """Make room for states of `dtype` too; False, and the forward is dropped, if the buffer cannot hold them."""
        dtype = torch.promote_types(forward.view.dtype, dtype)
        if dtype != forward.view.dtype:
            wider = self.buffer.widen(forward.view, dtype)
            if wider is None:
                self.ignored[f"forwards whose states turned out to be {dtype}, too large for the buffer"] += 1
                self._forward = None
                return False
            forward.view, forward.states = wider, wider.unbind()
        return True

    def _runs_again(self, module: Module) -> bool:
        """Whether the first block's module is being called further up the same stream, rather than by a new forward."""
        forward = self._forward
        if forward is None or forward.filled < 2 or self._entry is not None:
            return False
        return self.stream.blocks[forward.filled - 1].module is module

    def _name(self, index: int) -> str:
        return self.stream.blocks[index].name


def _in_backward() -> bool:
    """Whether autograd is running: activation checkpointing then repeats forwards. Grad mode does not tell."""
    return torch._C._current_graph_task_id() != -1
