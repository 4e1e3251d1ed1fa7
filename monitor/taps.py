"""Hooks that read a model's states, in eager calls and inside compiled graphs.

A compiler traces a hook once and never runs its Python again. A resident tap therefore leaves an opaque operator in the
graph, which the compiler can neither look into, nor drop, nor move: declared to change a tensor that all taps of a
model share, it stays, and the taps stay in order. When the graph runs, the operator looks up on the host whether its
tap is armed, and returns at once if not. What is measured, of which rows and tokens, is thus no business of the graph,
and changes without a graph break and without a recompilation.
"""

import functools
import itertools
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast, no_type_check

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from repflow.monitor.masks import CallMasks, MaskReader, ToldMasks

_T = TypeVar("_T")
Read = Callable[[], tuple[bool, _T]]
"""Gives whether a call trains, by its grad mode and its state, and what the tap reads of it."""


def is_compiled(model: Module) -> bool:
    """Whether `model` or a module in it was compiled, by `torch.compile` or its own `compile()`.

    A function compiled around the model, or another wrapper of it, cannot be seen from here.
    """
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def outside_graphs(run: Callable[..., None], *, resident: bool) -> Callable[..., None]:
    """`run`, which calls every receiver, as something that no compiler looks into.

    The hooks of the outermost compiled module are called by Python, but under the eyes of the compiler: it would make
    graphs of them, one for each kind and shape of state. It is told to leave them alone there. Where compiled code
    calls a module, its hooks are traced with it all the same.
    """
    if not resident and "torch._dynamo" not in sys.modules:
        return run  # nothing is compiled yet, and the compiler takes a second to import
    import torch._dynamo.eval_frame

    torch._dynamo.eval_frame.skip_code(_Tap.__call__.__code__)
    return cast(Callable[..., None], torch.compiler.disable(run))


def outside_modes() -> AbstractContextManager[object]:
    """Hide what runs inside from modes that see every operation.

    Selective checkpointing keeps what some operations return, in order, and hands it out when it runs the block again:
    it would take the monitor's results for the model's. A counter of FLOPs would count the monitor's.
    """
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


class Taps:
    """The hooks of one reader of a model.

    Args:
        resident: made to stay on a model that is compiled: also traced by the compiler, into operators that do nothing
            until `arm`. Otherwise a compiler finds nothing to trace.
    """

    def __init__(self, *, resident: bool) -> None:
        self._order = torch.zeros(1, device="cpu") if resident else None
        self._receivers: dict[int, Callable[..., None]] = {}
        self._handles: list[RemovableHandle] = []
        # Whoever drops a monitor without closing it, as a notebook cell run again does, leaves no hooks behind.
        weakref.finalize(self, _remove, self._handles, self._receivers)

    def on_masks(self, module: Module, receive: Callable[[Read[ToldMasks]], None], *, decoder: bool = False) -> None:
        """Call `receive` with the masks that each call of `module` gets; `decoder`: see `MaskReader`."""
        reader = MaskReader(module, decoder=decoder)
        self._add(module.register_forward_pre_hook, _MaskTap, reader, receive, with_kwargs=True)

    def on_entry(self, module: Module, read: Callable[..., Tensor], receive: Callable[[Read[Tensor]], None]) -> None:
        """Call `receive` with the state that `read` finds in the arguments of each call of `module`."""
        self._add(module.register_forward_pre_hook, _EntryTap, read, receive, with_kwargs=True)

    def on_exit(self, module: Module, read: Callable[[Any], Tensor], receive: Callable[[Read[Tensor]], None]) -> None:
        """Call `receive` with the state that `read` finds in what each call of `module` returns."""
        self._add(module.register_forward_hook, _ExitTap, read, receive)

    def arm(self) -> None:
        """From now on the receivers are called."""
        _ARMED.update(self._receivers)

    def disarm(self) -> None:
        """From now on nothing is called."""
        _disarm(self._receivers)

    def remove(self) -> None:
        """Take the hooks off the model. A graph that has them is compiled again when it is next called."""
        _remove(self._handles, self._receivers)

    def _add(
        self, register: Callable[..., RemovableHandle], kind: type["_Tap"], read: Any, receive: Any, **options: Any
    ) -> None:
        number = next(_NUMBERS)
        self._receivers[number] = receive
        self._handles.append(register(kind(number, read, self._order), **options))


@no_type_check  # a check of types at run time would be traced with it
class _Tap:
    """A hook that stays with its module: copying or pickling a tapped model must not take the monitor along.

    It holds what the compiler may see, and no more: what a guard depends on must not change from step to step, nor from
    block to block.
    """

    def __init__(self, number: int, read: Any, order: Tensor | None) -> None:
        self.number, self.read, self.order = number, read, order
        # The number as a tensor: blocks that share one graph differ in what they feed it.
        self.marker = None if order is None else torch.tensor([number], device="cpu")

    def __call__(self, module: Module, args: tuple[Any, ...], rest: Any) -> None:
        """Args and kwargs of a call, or args and what it returns."""
        if not torch.compiler.is_compiling():
            receive = _ARMED.get(self.number)
            if receive is not None:
                receive(functools.partial(self.reading, args, rest))
        elif self.marker is not None and not _is_exporting():
            self.trace(args, rest)

    def reading(self, args: tuple[Any, ...], rest: Any) -> tuple[bool, Any]:
        """Whether gradients are enabled, and what is read of the call."""
        raise NotImplementedError

    def trace(self, args: tuple[Any, ...], rest: Any) -> None:
        """Leave the operator in the graph. Whatever goes wrong shows when it runs, not here."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A copy takes any arguments and does nothing. Every Python has it: models load where repflow is not there."""
        return getattr, (nullcontext(), "__exit__")


@no_type_check
class _StateTap(_Tap):
    def state(self, args: tuple[Any, ...], rest: Any) -> Tensor:
        """What the tap is there to read."""
        raise NotImplementedError

    def reading(self, args: tuple[Any, ...], rest: Any) -> tuple[bool, Tensor]:
        state = self.state(args, rest)
        return torch.is_grad_enabled() or _is_checkpointed(state), _plain(state.detach())

    def trace(self, args: tuple[Any, ...], rest: Any) -> None:
        grad, plain = torch.is_grad_enabled(), None
        try:
            state = self.state(args, rest)
            if _is_whole(state):  # and inside of graphs, a state with gradients is the only sign of checkpointing
                grad, plain = grad or state.requires_grad, _plain(state.detach())
        except Exception:
            plain = None
        if type(plain) is not Tensor:  # an operator takes nothing else
            plain = None
        torch.ops.repflow.tap_state(plain, grad, self.marker, self.order)


@no_type_check
class _EntryTap(_StateTap):
    def state(self, args: tuple[Any, ...], rest: Any) -> Tensor:
        return self.read(args, rest)


@no_type_check
class _ExitTap(_StateTap):
    def state(self, args: tuple[Any, ...], rest: Any) -> Tensor:
        return self.read(rest)


@no_type_check
class _MaskTap(_Tap):
    def reading(self, args: tuple[Any, ...], rest: Any) -> tuple[bool, ToldMasks]:
        masks, tells, _ = self.read(args, rest)
        others = functools.partial(self.read.others, args, rest)
        return torch.is_grad_enabled(), ToldMasks(CallMasks(*(_plain(mask) for mask in masks)), tells, others)

    def trace(self, args: tuple[Any, ...], rest: Any) -> None:
        masks, tells, _ = self.read(args, rest, boundaries=False)
        grad, tensors = torch.is_grad_enabled(), masks[:-1]
        if all(_is_whole(mask) for mask in tensors):
            plain = [_plain(mask) for mask in tensors]
            torch.ops.repflow.tap_masks(plain, [*tells, masks.cached], grad, self.marker, self.order)
        else:
            torch.ops.repflow.tap_state(None, grad, self.marker, self.order)


_NUMBERS = itertools.count()
_ARMED: dict[int, Callable[..., None]] = {}
"""Receivers of the armed taps by number: what an operator of a compiled graph can reach is a number and this module."""


def _is_exporting() -> bool:
    # What `torch.compiler.is_exporting` returns; PyTorch 2.11 takes it for True whenever it compiles.
    return getattr(torch.compiler, "_is_exporting_flag", False)


def _disarm(receivers: dict[int, Callable[..., None]]) -> None:
    for number in receivers:
        _ARMED.pop(number, None)


def _remove(handles: list[RemovableHandle], receivers: dict[int, Callable[..., None]]) -> None:
    _disarm(receivers)
    for handle in handles:
        handle.remove()
    handles.clear()


def _is_checkpointed(state: Tensor) -> bool:
    """Whether reentrant checkpointing runs a call: without gradients, on a state that has them.

    It is a function of autograd, and unlike `torch.no_grad` these switch off gradients of both modes.
    """
    both_off = not torch.is_grad_enabled() and not torch._C._is_fwd_grad_enabled()
    return both_off and not torch.is_inference_mode_enabled() and state.requires_grad


@no_type_check  # compilers trace it
def _is_whole(value: Tensor | None) -> bool:
    """Whether this rank has all of a value, or all of some sequences. Only a DTensor may be less."""
    placements = getattr(value, "placements", None)
    if placements is None:
        return True
    mesh = value.device_mesh
    return all(  # `mesh.shape` cannot be traced by PyTorch 2.11
        placement.is_replicate() or placement.is_shard(0) or mesh.size(dim) == 1
        for dim, placement in enumerate(placements)
    )


@no_type_check
def _plain(value: Any) -> Any:
    """What this rank has of a DTensor; anything else as it is.

    Raises:
        TypeError: it has but a part.
    """
    if not _is_whole(value):
        raise TypeError(
            f"expected states and masks that every rank holds whole, got a DTensor with placements {value.placements}, "
            "of which each has a part; pass blocks=[...] whose states are replicated, or sharded by sequences"
        )
    return value.to_local() if hasattr(value, "placements") else value


def _tap_state(state: Tensor | None, grad: bool, marker: Tensor, order: Tensor) -> None:
    receive = _ARMED.get(int(marker))
    if receive is not None:
        receive(functools.partial(_readable, grad, state))


def _readable(grad: bool, state: Tensor | None) -> tuple[bool, Tensor]:
    if state is None:
        raise TypeError(
            "expected a block that takes and returns its state as a plain floating tensor, or as a DTensor that every "
            "rank holds whole, and masks alike, got something else while the model was compiled; pass the blocks that "
            "do, blocks=[...]"
        )
    return grad, state


def _tap_masks(
    masks: list[Tensor | None],
    tells: list[bool],
    grad: bool,
    marker: Tensor,
    order: Tensor,
) -> None:
    receive = _ARMED.get(int(marker))
    if receive is not None:
        # Copies: the graph reuses the memory of what it is done with, and masks are needed at the end of the forward.
        copies: list[Any] = [None if mask is None else mask.clone() for mask in masks]
        told = ToldMasks(CallMasks(*copies)._replace(cached=tells[-1]), tuple(tells[:-1]))
        receive(lambda: (grad, told))


_OPERATORS = {
    "tap_state(Tensor? state, bool grad, Tensor marker, Tensor(a!) order) -> ()": _tap_state,
    "tap_masks(Tensor?[] masks, bool[] tells, bool grad, Tensor marker, Tensor(a!) order) -> ()": _tap_masks,
}
# A CUDA graph would replay what the operator did when it was recorded: it is cut around operators of this tag, where
# PyTorch has it, and else not made at all, since the operator works on the host.
_TAGS = [torch.Tag.pt2_compliant_tag, *filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)])]
_LIBRARY = torch.library.Library("repflow", "FRAGMENT")
for _schema, _implementation in _OPERATORS.items():
    _LIBRARY.define(_schema, tags=_TAGS)
    _name = _schema.partition("(")[0]
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"repflow::{_name}", lambda *args: None, lib=_LIBRARY)
