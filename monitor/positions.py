"""Where each token stands in its sequence, or in its document of a packed row."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor


class Positions(NamedTuple):
    """Position among the valid tokens of the same group, so that padding on either side shifts nothing."""

    rank: Int64[Tensor, "B T"]
    """0 for the first valid token of the group; meaningless at padding."""
    size: Int64[Tensor, "B T"]
    """Valid tokens of the group; at least 1."""

    def bins(self, number: int) -> Int64[Tensor, "B T"]:
        """Relative position ⌊number·rank/size⌋, from 0 to `number` − 1."""
        return (self.rank * number).div(self.size, rounding_mode="floor").clamp(0, number - 1)


def every_position(rows: int, tokens: int, device: torch.device) -> Positions:
    """Positions where every token is valid, and a row is a group."""
    rank = torch.arange(tokens, device=device).expand(rows, tokens)
    return Positions(rank, torch.full((1, 1), max(tokens, 1), device=device).expand(rows, tokens))


def token_positions(mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"]) -> Positions:
    """Positions of every token, from the mask of the whole batch (before tokens are sampled). Waits for no GPU."""
    if mask.dtype == torch.bool:
        return _row_positions(mask)
    tokens = mask.shape[1]
    number, place = mask.sort(dim=1, stable=True)  # tokens of a document stand together, in their order
    column = torch.arange(tokens, device=mask.device).expand_as(place)
    begins, ends = (torch.ones_like(mask, dtype=torch.bool) for _ in range(2))
    begins[:, 1:] = ends[:, :-1] = number[:, 1:] != number[:, :-1]
    first = torch.where(begins, column, 0).cummax(1).values
    last = torch.where(ends, column, tokens).flip(1).cummin(1).values.flip(1)

    def back(values: Tensor) -> Tensor:
        return torch.empty_like(place).scatter_(1, place, values)

    return Positions(back(column - first), back(last - first + 1))


def without_first(
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None, positions: Positions, number: int
) -> Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None:
    """`mask` without the first `number` tokens of every group; None: every token is valid."""
    if not number:
        return mask
    return positions.rank >= number if mask is None else mask.masked_fill(positions.rank < number, 0)


def _row_positions(valid: Bool[Tensor, "B T"]) -> Positions:
    rank = valid.cumsum(1) - 1
    return Positions(rank, valid.sum(1, keepdim=True).clamp(min=1).expand_as(rank))
