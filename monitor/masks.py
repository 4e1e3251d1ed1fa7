"""Which tokens are padding, and which belong together: read from the arguments that models are called with."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor
from torch.nn import Module

PADDING_ARGUMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": lambda mask: mask > 0 if mask.is_floating_point() else mask,
    # Of torch.nn.TransformerEncoder and TransformerDecoder, where what is not 0 is padding:
    "src_key_padding_mask": lambda mask: mask == 0,
    "tgt_key_padding_mask": lambda mask: mask == 0,
}
"""Names under which models take a mask `[B, T]`, and how to turn it into one where 0 is padding."""


class CallMasks(NamedTuple):
    """What one call of a module says about its tokens."""

    padding: Shaped[Tensor, "B T"] | None = None
    """0 at padding."""
    position_ids: Int[Tensor, "B T"] | None = None
    """Positions, which start again with each document of a packed row."""


class ToldMasks(NamedTuple):
    """What one call tells by itself: a mask may be told to be None."""

    padding: Shaped[Tensor, "B T"] | None
    position_ids: Int[Tensor, "B T"] | None
    tells_padding: bool
    tells_positions: bool

    def within(self, outer: CallMasks) -> CallMasks:
        """The masks of the call, where `outer` are those of the call around it."""
        return CallMasks(
            self.padding if self.tells_padding else outer.padding,
            self.position_ids if self.tells_positions else outer.position_ids,
        )


@no_type_check  # compilers trace it
class MaskReader:
    """Reads the masks of the calls of `module`.

    A call of a module further in says more than one further out, for it is nearer to the blocks: a decoder that is
    called without a mask has none, whatever its encoder's is. Where it does not tell, because the module takes no such
    argument or was given it in another form (already widened to 4-D, say), what was found further out holds.
    """

    def __init__(self, module: Module) -> None:
        self._parameters = list(inspect.signature(module.forward).parameters)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ToldMasks:
        """What a call tells. A compiler traces this."""
        padding, tells_padding = None, False
        for name, convert in PADDING_ARGUMENTS.items():
            tells_padding, value = self._argument(name, args, kwargs)
            if tells_padding:
                padding = None if value is None else convert(value)
                break
        tells_positions, ids = self._argument("position_ids", args, kwargs)
        return ToldMasks(padding, ids, tells_padding, tells_positions)

    def takes_mask(self) -> bool:
        """Whether the module's forward names a mask."""
        return any(name in self._parameters for name in PADDING_ARGUMENTS)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Tensor | None]:
        """Whether the call tells the argument, and its value."""
        position = self._parameters.index(name) if name in self._parameters else len(args)
        value = kwargs.get(name, args[position] if position < len(args) else None)
        if isinstance(value, Tensor) and value.ndim == 2:
            return True, value
        return value is None and name in self._parameters, None


def token_groups(masks: CallMasks, rows: int, tokens: int) -> Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None:
    """One mask `[rows, tokens]` of what a call said: 0 is padding, k is document k of its row; None, no padding.

    Raises:
        ValueError: a mask of another shape.
    """
    padding = fit_mask(masks.padding, rows, tokens)
    ids = masks.position_ids
    if ids is None or ids.shape[0] not in (1, rows) or ids.shape[1] != tokens:
        return padding
    ids = ids.expand(rows, tokens)
    return _documents(ids, torch.ones_like(ids, dtype=torch.bool) if padding is None else padding != 0)


def fit_mask(mask: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """A mask of the states' shape `[rows, tokens]`, from what models and users call a mask.

    Raises:
        ValueError: it is something else.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.shape == (rows, tokens)):
        return mask
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == rows and mask.shape[1] > tokens:
        return mask[:, -tokens:]  # covers cached or virtual tokens in front
    if isinstance(mask, Tensor) and mask.shape == (tokens, tokens):
        return None  # which token sees which: says nothing about padding
    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"expected a mask of shape {[rows, tokens]} like the states, got {got}; "
        "pass the right one: monitor.step(k, mask=...)"
    )


def _documents(ids: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
    """Document numbers from 1 up: another begins where positions do not go on."""
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] <= ids[:, :-1]
    number = begins.cumsum(1)
    # Positions of padding may do anything: count from the first token that is none.
    first = torch.where(valid, number, ids.shape[1]).amin(1, keepdim=True)
    return torch.where(valid, number - first + 1, 0)
