"""From what a block returns to its state `[B, T, D]`, and from a gradient of the state back."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from repflow.monitor.readers import FIRST_TENSOR, HIDDEN_PLUS_RESIDUAL, Reader


def entry_of(reader: Reader) -> Callable[..., Tensor]:
    """What reads the shape of a block's input state; of two tensors whose sum it is, the first has that too."""
    return FIRST_TENSOR.entry if reader is HIDDEN_PLUS_RESIDUAL else reader.entry


def tensors_of(reader: Reader, output: Any) -> tuple[Tensor, ...]:
    """The tensors that a block returns as its state: one, or two whose sum it is."""
    first = FIRST_TENSOR.exit(output)
    if reader is HIDDEN_PLUS_RESIDUAL and isinstance(output, tuple | list) and len(output) > 1:
        residual = output[1]
        if isinstance(residual, Tensor) and residual.shape == first.shape:
            return first, residual
    return (first,)


def state_of(reader: Reader, tensors: tuple[Tensor, ...]) -> Tensor:
    """`[B, T, D]` of what a block returned."""
    state = reader.exit(tensors[0] if len(tensors) == 1 else tensors).detach()
    return state.unsqueeze(0) if state.ndim == 2 else state


def as_returned(reader: Reader, gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient `[B, T, D]` in the shape of what the block returned."""
    if like.ndim == 2:
        return gradient[0]
    return gradient if gradient.shape == like.shape and reader.exit(like) is like else gradient.transpose(0, 1)
