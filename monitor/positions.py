"""Where each token stands in its sequence, or in its document of a packed row."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from repflow.triton_kernels.groups import Groups


class Positions(NamedTuple):
    """Position among the valid tokens of the same group, so that padding on either side shifts nothing."""

    rank: Int64[Tensor, "B T"]
    """0 for the first valid token of the group; meaningless at padding."""
    size: Int64[Tensor, "B T"]
    """Valid tokens of the group; at least 1."""

    def bins(self, number: int) -> Int64[Tensor, "B T"]:
        """Relative position ⌊number·rank/size⌋, from 0 to `number` − 1."""
        return (self.rank * number).div(self.size, rounding_mode="floor").clamp(0, number - 1)


def token_positions(groups: Groups) -> Positions:
    """Positions of every token, from the groups of the whole batch (before tokens are sampled)."""
    valid = groups.index >= 0
    if groups.by_row:
        rank = valid.cumsum(1) - 1
        return Positions(rank, valid.sum(1, keepdim=True).clamp(min=1).expand_as(rank))
    key = groups.index.flatten()
    order = key.argsort(stable=True)
    sizes = torch.bincount(key + 1, minlength=groups.count + 1)
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(key)
    rank[order] = torch.arange(key.numel(), device=key.device) - first[key[order] + 1]
    return Positions(rank.view_as(groups.index), sizes[key + 1].view_as(groups.index))


def without_first(
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"], positions: Positions, number: int
) -> Bool[Tensor, "B T"] | Int[Tensor, "B T"]:
    """`mask` without the first `number` tokens of every group."""
    return mask.masked_fill(positions.rank < number, 0) if number else mask
