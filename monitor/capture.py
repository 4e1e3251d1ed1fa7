"""From hooks to one buffer: copies of the sampled sequences and tokens of h^(0..L), for every training forward."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from repflow.monitor.buffer import CaptureBuffer
from repflow.monitor.captured import CapturedForward, Recording
from repflow.monitor.chain import Chain
from repflow.monitor.masks import CallMasks, MaskReader, ToldMasks, misfit, token_groups, unread_mask
from repflow.monitor.residual_stream import Block, ResidualStream
from repflow.monitor.sampling import Selection
from repflow.monitor.taps import Read, Taps, outside_graphs
from repflow.monitor.weakly import weakly

GivenMask = Tensor | Callable[[], Tensor | None]
"""A mask `[B, T]` in place of those that the model receives, or what gives it for a recorded forward: None, those."""


class CaptureError(RuntimeError):
    """The states of a forward cannot be captured; the message names the layer and the remedy."""


@dataclass(eq=False)
class _Entry:
    """What was seen on the way in: the innermost call of a module that contains the blocks."""

    depth: int
    grad: bool
    training: bool
    masks: CallMasks = field(default_factory=CallMasks)
    skipped: str | None = None
    """What ran before the first block. The forward is left out if that does not run any more."""


@dataclass(eq=False)
class Capture:
    """Taps on a stream, that read it between `arm` and `disarm`.

    Recorded is each forward that begins with gradients enabled and the model in training mode, unless `training_only`
    is switched off. Not recorded: evaluation, `generate()`, forwards under no_grad, and what activation checkpointing
    recomputes during backward. `ignored` counts the forwards left out.
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
    resident: bool = False
    """The taps stay on the model until `remove`, for it is compiled; otherwise they are there between the two."""
    training_only: bool = True
    """Leave out forwards without gradients or in evaluation mode. False: record these too."""
    inner: Sequence[tuple[Module, Callable[[Recording, Callable[[], Tensor]], None]]] = ()
    """Modules inside of blocks, and what to call with the recorded forward and how to read what the module returned."""
    sliced: bool = False
    """Rows are slices of sequences, of which other ranks have the rest: documents that a forward tells are refused."""
    ignored: Counter[str] = field(default_factory=Counter)
    broken: str | None = None
    """How the chain of blocks broke since `arm`: those forwards were left out."""
    unread: str | None = None
    """What may be the mask of a forward that was recorded without one."""
    _chain: Chain = field(init=False)
    _taps: Taps | None = None
    _entry: _Entry | None = None
    _forward: Recording | None = None
    _mask: GivenMask | None = None
    _looks: bool = True  # for masks under other names, up to the first forward that is recorded
    _others: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._chain = Chain(self.stream)
        if any(getattr(block.module, "residual_in_fp32", False) for block in self.stream.blocks):
            self.buffer.expect(torch.float32)  # as Mamba's are: h^(0) is as narrow as the weights, all others are not
        self.run = outside_graphs(self.run, resident=self.resident)
        if self.resident:
            self._taps = self._tap()

    def arm(self, mask: GivenMask | None) -> None:
        """Begin to record. `mask` replaces the masks that the model receives."""
        self.disarm()
        self.ignored.clear()
        self.broken = None
        self._mask = mask
        self._taps = self._taps or self._tap()
        self._taps.arm()

    @contextmanager
    def masked(self, mask: GivenMask) -> Iterator[None]:
        """In here, `mask` replaces the masks that the model receives."""
        around, self._mask = self._mask, mask
        try:
            yield
        finally:
            self._mask = around

    def disarm(self) -> None:
        """Record no more. A forward that is under way is dropped."""
        if self.resident and self._taps is not None:
            self._taps.disarm()
        else:
            self.remove()
        if self._forward is not None:
            self._count_incomplete(self._forward)
        self._count_skipped()
        self._chain.end()
        self._others.clear()
        self._entry = self._forward = self._mask = None

    def remove(self) -> None:
        """Leave nothing on the model."""
        if self._taps is not None:
            self._taps.remove()
        self._taps = None

    def _tap(self) -> Taps:
        taps, call = Taps(resident=self.resident), self._call
        for depth, module in enumerate(self.stream.ancestors):
            taps.on_masks(module, call(self._enter, depth, module), decoder=self.stream.is_decoder)
        first = self.stream.blocks[0]
        if self._looks and not self.resident:
            taps.on_masks(first.module, call(self._see))
        taps.on_entry(first.module, first.reader.entry, call(self._begin, first.module))
        indices: dict[Module, list[Block]] = {}
        for block in self.stream.blocks[: -1 if self.final_norm else None]:
            indices.setdefault(block.module, []).append(block)
        for module, blocks in indices.items():
            taps.on_exit(module, blocks[0].reader.exit, call(self._leave, [block.index for block in blocks]))
        if self.final_norm and self.stream.final_norm is not None:
            last = self.stream.blocks[-1]
            taps.on_exit(self.stream.final_norm, last.reader.exit, call(self._leave, [last.index]))
        if self._follows_chain():
            for block in self.stream.blocks[1:]:
                taps.on_entry(block.module, block.reader.entry, call(self._follow, block.module))
        for module, use in self.inner:
            taps.on_exit(module, _itself, call(self._look_inside, use))
        return taps

    def _follows_chain(self) -> bool:
        """Whether to hold each block against the one before it: once, and not inside of graphs, which fuse them."""
        return not self.resident and not self._chain.verified

    def _call(self, call: Callable[..., None], *args: Any) -> Callable[..., None]:
        return functools.partial(self.run, weakly(call), *args)

    def _enter(self, depth: int, module: Module, read: Read[ToldMasks]) -> None:
        """A module that contains the blocks is called: remember the mode and the masks."""
        if _in_backward():
            return
        inside = self._entry is not None and self._entry.depth < depth
        if not inside:
            self._count_skipped()
        outer = self._entry.masks if inside and self._entry is not None else CallMasks()
        grad, told = read()
        self._entry = _Entry(depth, grad, module.training, told.within(outer))
        if self._looks:
            self._others.update(told.others())

    def _see(self, read: Read[ToldMasks]) -> None:
        """The first block is about to begin: what it takes besides its state may be a mask that the model has made."""
        if self._forward is None and not _in_backward():
            self._others.update(read()[1].others())

    def _begin(self, module: Module, read: Read[Tensor]) -> None:
        """The first block is called: decide whether to record, and take h^(0)."""
        if _in_backward() or self._runs_again(module):
            return
        entry, self._entry = self._entry or _Entry(0, read()[0], module.training), None
        if self._forward is not None:
            self._count_incomplete(self._forward)
            self._forward = None
        if _in_transform():
            self.ignored["forwards inside of torch.func, whose states are not tensors by themselves"] += 1
        elif self.training_only and not entry.grad:
            self.ignored["forwards without gradients"] += 1
        elif self.training_only and not entry.training:
            self.ignored["forwards in evaluation mode"] += 1
        else:
            state = read()[1]
            if self._follows_chain():
                self._chain.begin(state)
            given = None if self._mask is None else _given(self._mask)
            masks = entry.masks if given is None else CallMasks(given)
            self._forward = self._start(state, masks, exact=given is not None)
            if self._forward is not None:
                self._store(self._forward, state)
        self._others.clear()

    def _leave(self, owned: list[int], read: Read[Tensor]) -> None:
        """Block l returns: take h^(l+1).

        `owned` are the positions of this module in the stream, several if it is shared.
        """
        forward, entry = self._forward, self._entry
        if _in_backward() or (forward is None and not (entry and entry.grad and entry.training)):
            return
        index = 0 if forward is None else forward.filled - 1
        if forward is None or index not in owned:  # also what skips a block at random, as LayerDrop does
            what = f"forwards that ran '{self._name(owned[0])}' where '{self._name(index)}' was expected"
            if forward is not None:
                self.ignored[what] += 1
            elif entry is not None:
                entry.skipped = entry.skipped or what
            self._forward = None
            return
        state = read()[1]
        if self._follows_chain():
            self._chain.left(index, state)
        self._store(forward, state)
        if forward.filled == len(self.stream) + 1:
            self._forward = None
            selection = forward.selection(forward.view.device)
            self.on_forward(CapturedForward(forward.view, forward.mask, selection, forward.shape[:2]))

    def _look_inside(self, use: Callable[[Recording, Callable[[], Tensor]], None], read: Read[Tensor]) -> None:
        if self._forward is not None and not _in_backward():
            use(self._forward, lambda: read()[1])

    def _follow(self, module: Module, read: Read[Tensor]) -> None:
        """A block but the first is called: it must take what the one before it returned."""
        forward = self._forward
        index = 0 if forward is None else forward.filled - 1
        if self._chain.verified or index == 0 or self.stream.blocks[index].module is not module or _in_backward():
            return  # blocks in another order are told when they return
        if broken := self._chain.broken(index, read()[1]):
            self._forward = None
            self.broken = broken
            self.ignored[f"forwards in which {broken}"] += 1

    def _count_skipped(self) -> None:
        if self._entry is not None and self._entry.skipped is not None:
            self.ignored[self._entry.skipped] += 1

    def _count_incomplete(self, forward: Recording) -> None:
        what = "did not pass through all blocks"
        if self.final_norm and forward.filled == len(self.stream):
            what = 'did not call the final norm, as where it is fused with a sum: use states="residual"'
        self.ignored[f"forwards that {what}"] += 1

    def _start(self, state: Tensor, masks: CallMasks, *, exact: bool) -> Recording | None:
        flat_tokens = state.ndim == 2
        if flat_tokens:
            state = state.unsqueeze(0)
            masks = masks.of_flat_tokens()
        if state.ndim != 3:
            raise CaptureError(
                f"expected states of shape [B, T, D], got {list(state.shape)} at the input of '{self._name(0)}'; "
                "pass the blocks of a stream of tokens, blocks=[...]"
            )
        rows, tokens, features = state.shape
        if rows * tokens == 0:
            self.ignored["forwards without a token"] += 1
            return None
        if self.sliced and (masks.segments is not None or masks.boundaries is not None):
            raise CaptureError(
                "expected one sequence in each row under sequence_group, got numbers or boundaries of documents, which "
                "do not tell how a document goes on in the next slice; pass a boolean mask, monitor.step(k, mask=...), "
                "to take each row as one sequence"
            )
        mask = token_groups(masks, rows, tokens, exact=exact)
        if self._looks and mask is None and not exact:
            self.unread = misfit(masks, tokens) or unread_mask(self._others, rows, tokens) or self._untold(masks)
        self._looks = False
        selection = self.choose((rows, tokens), state).to(state.device)
        view = self.buffer.view((len(self.stream) + 1, *selection.shape, features), state)
        return Recording(view, view.unbind(), {state.device: selection}, (rows, tokens, features), flat_tokens, mask)

    def _untold(self, masks: CallMasks) -> str | None:
        """That a decoder was told of no padding: its input was made elsewhere, as the Trainer does to smooth labels."""
        owners = (MaskReader(module, decoder=self.stream.is_decoder) for module in self.stream.ancestors)
        if masks.targets is not None or not any(owner.makes_decoder_input() for owner in owners):
            return None
        return "'decoder_input_ids', given without 'decoder_attention_mask' and 'labels',"

    def _store(self, forward: Recording, state: Tensor) -> None:
        if forward.flat_tokens:
            state = state.unsqueeze(0)
        if state.shape != forward.shape:
            raise CaptureError(
                f"expected every state to be {list(forward.shape)} like the first, got {list(state.shape)} from "
                f"'{self._name(forward.filled - 1)}'; repflow follows a stream of one width, which blocks return as a "
                "tensor or first in a tuple: pass the part of the model that has it, blocks=[...]"
            )
        if state.dtype != forward.view.dtype and not self._widen(forward, state.dtype):
            return
        forward.selection(state.device).copy_into(forward.states[forward.filled], state)
        forward.filled += 1

    def _widen(self, forward: Recording, dtype: torch.dtype) -> bool:
        """Make room for states of `dtype` too; False, and the forward is dropped, if the buffer cannot hold them."""
        dtype = torch.promote_types(forward.view.dtype, dtype)
        if forward.widen(self.buffer, dtype):
            return True
        self.ignored[f"forwards whose states turned out to be {dtype}, too large for the buffer"] += 1
        self._forward = None
        return False

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


def _given(mask: GivenMask) -> Tensor | None:
    """The mask itself.

    Raises:
        CaptureError: the function that gives it has raised.
    """
    try:
        return mask() if callable(mask) else mask
    except Exception as error:
        raise CaptureError(f"the function given as mask= raised {type(error).__name__}: {error}") from error


def _in_transform() -> bool:
    """Whether a transform of torch.func runs, such as `vmap` or `grad`."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def _itself(output: Tensor) -> Tensor:
    return output
