"""Hooks that change the gradient of what a block returns, in eager calls and inside compiled graphs.

What the block returns goes through a function of autograd whose forward is the identity: the same tensor, of which not
a bit changes. Its backward calls a receiver with the gradient. A compiler traces the function, and of the backward an
opaque operator, which looks up its receiver on the host when the graph runs (see `taps`).
"""

import itertools
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

Push = Callable[[object, tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]
"""From a forward (None inside of a graph), the gradients of tensors and these themselves to other gradients."""


class Injections:
    """The changing hooks on a model, until `remove`.

    Args:
        resident: whether the model is compiled: a compiler then finds the functions to trace.
    """

    def __init__(self, *, resident: bool) -> None:
        self._resident = resident
        self._handles: list[RemovableHandle] = []

    def on_exit(
        self,
        module: Module,
        owner: object,
        select: Callable[[Any], tuple[Tensor, ...]],
        check: Callable[..., object],
        push: Push,
    ) -> None:
        """Let `push` change the gradient of the tensors that `select` finds first in what training calls return.

        `check` is called with these tensors when an eager call returns, and gives the forward that `push` is told.
        `owners_on` finds the `owner`.
        """
        hook = _Injection(owner, select, check)
        self._number(hook, push)
        self._handles.append(module.register_forward_hook(hook))

    def on_loss(
        self, module: Module, follow: Callable[[Tensor, bool], object], note: Callable[[bool, Tensor], None]
    ) -> None:
        """Call `follow` with the loss that a call of `module` returns; inside of a graph, `note` with its gradient.

        Both are told whether it was but guessed to be the loss.
        """

        def pushes(guessed: bool) -> Push:
            def push(forward: object, gradients: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                note(guessed, gradients[0])
                return tuple(gradient.clone() for gradient in gradients)

            return push

        hook = _LossInjection(follow)
        self._number(hook, pushes(False))
        self._number(hook.guess, pushes(True))
        self._handles.append(module.register_forward_hook(hook))

    def remove(self) -> None:
        """Take the hooks off the model. A graph that has them is compiled again when it is next called."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _number(self, hook: "_Hook", push: Push) -> None:
        number = next(_NUMBERS)
        hook.push = push
        # The number as a tensor: blocks that share one graph differ in what they feed it.
        hook.marker = torch.tensor([number], device="cpu") if self._resident else None
        _HOOKS[number] = hook


def owners_on(modules: Iterable[Module]) -> list[object]:
    """The owners of what is injected at the exits of modules, each once."""
    hooks = [hook for module in modules for hook in module._forward_hooks.values() if isinstance(hook, _Injection)]
    return list(dict.fromkeys(hook.owner for hook in hooks))


_NUMBERS = itertools.count()
_HOOKS: weakref.WeakValueDictionary[int, "_Hook"] = weakref.WeakValueDictionary()
"""By number, which is what an operator of a graph has of them. They live as long as the modules that they are on."""


@no_type_check  # compilers trace it
class _Hook:
    """A hook that stays with its module: a copy of the model does not take it along."""

    push: Push
    __call__: Callable[..., Any]
    marker: Tensor | None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A copy takes any arguments and does nothing."""
        return getattr, (nullcontext(), "__exit__")


@no_type_check
class _Injection(_Hook):
    def __init__(self, owner: Any, select: Any, check: Any) -> None:
        self.owner, self.select, self.check = owner, select, check

    def __call__(self, module: Module, args: tuple[Any, ...], output: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return None
        if not torch.compiler.is_compiling():
            tensors = self.select(output)
            forward = self.check(tensors)
            return _replaced(output, _RepresentationRegularizerIdentity.apply(self.push, forward, *tensors))
        tensors = self.select(output)
        if self.marker is None or not tensors[0].requires_grad:
            return None
        return _replaced(output, _TracedInject.apply(self.marker, *tensors))


@no_type_check
class _LossInjection(_Hook):
    def __init__(self, follow: Any) -> None:
        self.follow = follow
        self.guess = _Hook()

    def __call__(self, module: Module, args: tuple[Any, ...], output: Any) -> Any:
        if not module.training:
            return None
        key, loss, guessed = loss_of(output)
        if loss is None:
            return None
        if not torch.compiler.is_compiling():
            self.follow(loss, guessed)
            return None
        if self.marker is None:
            return None
        (loss,) = _TracedInject.apply(self.guess.marker if guessed else self.marker, loss)
        return _with_loss(output, key, loss)


@no_type_check
def loss_of(output: Any) -> tuple[Any, Tensor | None, bool]:
    """The loss in what a model returns: its key there, itself, and whether it was but guessed to be that.

    It is a tensor without dimensions and with a gradient: what is returned alone, stands first in a tuple, or has the
    name. Without one of these, the only such tensor is guessed to be the loss.
    """
    if isinstance(output, Tensor):
        return None, output if _is_loss(output) else None, False
    if isinstance(output, dict) and "loss" in output:
        return "loss", output["loss"] if _is_loss(output["loss"]) else None, False
    if hasattr(output, "loss"):
        return "loss", output.loss if _is_loss(output.loss) else None, False
    if isinstance(output, (tuple, list)):
        values = list(enumerate(output))
    else:
        values = list(output.items()) if isinstance(output, dict) else []
    found = [(key, value) for key, value in values if _is_loss(value)]
    if found and (found[0][0] == 0 or len(found) == 1):
        return found[0][0], found[0][1], found[0][0] != 0
    return None, None, False


@no_type_check
def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point() and value.requires_grad


@no_type_check
def _with_loss(output: Any, key: Any, loss: Tensor) -> Any:
    """What a model returned, with its loss replaced."""
    if isinstance(output, Tensor):
        return loss
    if isinstance(output, dict):
        output[key] = loss
        return output
    if isinstance(output, (tuple, list)):
        values = [loss if index == key else value for index, value in enumerate(output)]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    output.loss = loss
    return output


@no_type_check
def _replaced(output: Any, tensors: tuple[Tensor, ...]) -> Any:
    """What a block returned, with its first tensors replaced: as many as there are, the head of nested tuples."""
    if isinstance(output, Tensor):
        return tensors[0]
    rest = list(output[len(tensors) :])
    changed = list(tensors) if len(tensors) > 1 else [_replaced(output[0], tensors)]
    return type(output)(*changed, *rest) if hasattr(output, "_fields") else type(output)([*changed, *rest])


class _RepresentationRegularizerIdentity(torch.autograd.Function):
    """The identity, whose backward asks `push`.

    What it returns is a view, of which autograd says by this name that it may not be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, push: Push, forward: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.push, ctx.forward_pass = push, forward
        ctx.save_for_backward(*tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "`RepresentationRegularizer`: expected a backward without create_graph=True: the term has no second "
                "derivative; call `detach` before gradients of gradients"
            )
        return None, None, *ctx.push(ctx.forward_pass, gradients, ctx.saved_tensors)


@no_type_check
class _TracedInject(torch.autograd.Function):
    """The same, of which a compiler sees an operator in the backward, and nothing behind that."""

    @staticmethod
    def forward(ctx, marker, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.marker = marker
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        tensors = [tensor.detach() for tensor in ctx.saved_tensors]
        return None, *torch.ops.repflow.push(list(gradients), tensors, ctx.marker)


def _push_in_graph(gradients: list[Tensor], tensors: list[Tensor], marker: Tensor) -> list[Tensor]:
    hook = _HOOKS.get(int(marker))
    changed = tuple(gradients) if hook is None else hook.push(None, tuple(gradients), tuple(tensors))
    return [
        new.clone(memory_format=torch.contiguous_format) if new is old else new.contiguous()
        for new, old in zip(changed, gradients, strict=True)
    ]


_TAGS = [torch.Tag.pt2_compliant_tag, *filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)])]
_LIBRARY = torch.library.Library("repflow", "FRAGMENT")
_LIBRARY.define("push(Tensor[] gradients, Tensor[] tensors, Tensor marker) -> Tensor[]", tags=_TAGS)
_LIBRARY.impl("push", _push_in_graph, "CompositeExplicitAutograd")
torch.library.register_fake(
    "repflow::push",
    lambda gradients, tensors, marker: [torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in gradients],
    lib=_LIBRARY,
)
