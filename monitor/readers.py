"""How to read the residual stream at the ends of a block: from its arguments, and from what it returns."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from repflow.monitor.wrappers import unwrap


@dataclass(frozen=True)
class Reader:
    """How to read the residual stream at a block's ends."""

    name: str
    """In words."""
    entry: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]
    """From the arguments of a block's forward to its input state."""
    exit: Callable[[Any], Tensor]
    """From what a block returns, or a norm behind the last one, to the output state."""


def _first_tensor_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = [kwargs[name] for name in ("hidden_states", "x", "src", "tgt", "input") if name in kwargs]
    for value in (*map(_head, args[:1]), *named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    got = ", ".join(map(_describe, (*args, *kwargs.values()))) or "none"
    raise TypeError(
        f"expected a block that takes its state as a floating tensor, got arguments {got}; "
        "pass the blocks that do, without an embedding before or a head behind them, blocks=[...]"
    )


def _head(value: Any) -> Any:
    """The first of a tuple, which blocks may hand on to each other as a whole."""
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value


def _first_tensor_out(output: Any) -> Tensor:
    first = _head(output)
    if not (isinstance(first, Tensor) and first.is_floating_point()):
        raise TypeError(
            "expected a block that returns its state as a floating tensor, or first in a tuple, "
            f"got {_describe(output)}; pass the blocks that do, blocks=[...]"
        )
    return first


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _sum_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _sum(_first_tensor_in(args, kwargs), kwargs.get("residual", args[1] if len(args) > 1 else None))


def _sum_out(output: Any) -> Tensor:
    residual = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
    return _sum(_first_tensor_out(output), residual)


def _sum(hidden: Tensor, residual: object) -> Tensor:
    """The sum in the wider dtype of both, as the next block adds them; the first block has no residual."""
    if not (isinstance(residual, Tensor) and residual.shape == hidden.shape):
        return hidden
    return hidden.detach() + residual.detach()  # not for autograd


def _batch_first(state: Tensor) -> Tensor:
    return state if state.ndim == 2 else state.transpose(0, 1)


FIRST_TENSOR = Reader("first tensor", _first_tensor_in, _first_tensor_out)
"""The state is the first argument, and the output or the first of its tuple, as in all blocks of transformers."""

SEQUENCE_FIRST = Reader(
    "first tensor, [T, B, D]",
    lambda args, kwargs: _batch_first(_first_tensor_in(args, kwargs)),
    lambda output: _batch_first(_first_tensor_out(output)),
)
"""States are `[T, B, D]`, or `[T, D]` of a single sequence: torch.nn.TransformerEncoderLayer and its kin, unless made
with `batch_first=True`, and XLNet."""

HIDDEN_PLUS_RESIDUAL = Reader("hidden + residual", _sum_in, _sum_out)
"""`forward(hidden, residual=None)` returns (hidden, residual), whose sum is the state: mamba_ssm, also when the sum is
fused into the norm of the next block."""


def _is_sequence_first(block: Module) -> bool:
    attention = getattr(block, "self_attn", None)
    return type(block).__name__ == "XLNetLayer" or getattr(attention, "batch_first", True) is False


def _takes_residual(block: Module) -> bool:
    return "residual" in inspect.signature(block.forward).parameters


READERS: list[tuple[Callable[[Module], bool], Reader]] = [
    (_is_sequence_first, SEQUENCE_FIRST),
    (_takes_residual, HIDDEN_PLUS_RESIDUAL),
]
"""Blocks that need another reader than `FIRST_TENSOR`: the first whose test holds for a block is used."""


def block_reader(block: Module) -> Reader:
    """How to read the states of a block, which may be wrapped."""
    inner = unwrap(block)
    return next((reader for fits, reader in READERS if fits(inner)), FIRST_TENSOR)
