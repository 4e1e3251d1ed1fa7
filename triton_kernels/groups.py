"""The groups of tokens that a mask describes: rows of the batch, or documents in packed rows."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group each token belongs to: its row, or its document in a packed row."""

    index: Int64[Tensor, "B T"]
    """Group of each token; −1 at padding, and in documents for which there is no room."""
    count: int
    """G, the number of groups, or the room for them."""
    by_row: bool
    """Whether group g is row g, rather than one of several documents."""
    valid: Bool[Tensor, "B T"]
    """Which tokens are no padding."""
    found: Int64[Tensor, ""] | None = None
    """Where there is room for G documents: how many there are, on the device."""

    @cached_property
    def in_order(self) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " G+1"]]:
        """The tokens of the flattened batch group by group, in their order, and where each group begins among them.

        Tokens of no group come last. Does not wait for a GPU.
        """
        key = torch.where(self.index < 0, self.count, self.index).flatten()
        key, order = key.sort(stable=True)
        return order, torch.searchsorted(key, torch.arange(self.count + 1, device=key.device))

    @property
    def sizes(self) -> Int64[Tensor, " G"]:
        """How many tokens each group has."""
        return self.valid.sum(1) if self.by_row else self.in_order[1].diff()


def find_groups(mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"], room: int | None = None) -> Groups:
    """The groups that `mask` describes.

    A boolean mask, or an integer mask without a value above 1: one group per row. Otherwise one group per document that
    occurs, ordered by row, then by number.

    Args:
        mask: 0 is padding, k is document k of its row.
        room: G for an integer mask, whatever it holds. Groups are then documents, the first `room` of them, and the
            groups left over are empty. Without it an integer mask is read, for which a GPU is waited for; a boolean one
            never is.
    """
    row = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1)
    valid = mask != 0
    if mask.dtype == torch.bool:
        return Groups(torch.where(valid, row, -1), mask.shape[0], by_row=True, valid=valid)
    if room is not None:
        return _first_documents(mask, valid, room)
    largest = int(mask.max()) if mask.numel() else 0
    if largest <= 1:
        return Groups(torch.where(valid, row, -1), mask.shape[0], by_row=True, valid=valid)
    key = torch.where(valid, row * (largest + 1) + mask, -1)
    documents = torch.unique(key[key >= 0])
    index = torch.where(key >= 0, torch.searchsorted(documents, key), -1)
    return Groups(index, documents.numel(), by_row=False, valid=valid)


def _first_documents(mask: Tensor, valid: Tensor, room: int) -> Groups:
    number, place = mask.sort(dim=1, stable=True)
    begins = number != 0
    begins[:, 1:] &= number[:, 1:] != number[:, :-1]
    document = begins.flatten().cumsum(0).view_as(begins) - 1
    measured = (number != 0) & (document < room)
    index = torch.empty_like(document).scatter_(1, place, torch.where(measured, document, -1))
    return Groups(index, room, by_row=False, valid=valid, found=begins.sum())


def group_members(groups: Groups) -> tuple[Tensor, Tensor]:
    """Index of the tokens of each group in the flattened batch, and which entries are tokens: both `[G, n]`.

    One group per row: the row itself, which needs no look at the mask's values. Documents: gathered, and padded to the
    longest; where there is room for more documents than there are, to the length of a row, for the longest is unknown
    without waiting.
    """
    rows, tokens = groups.index.shape
    device = groups.index.device
    if groups.by_row:
        token = torch.arange(rows * tokens, device=device).view(rows, tokens)
        return token, groups.index == torch.arange(rows, device=device).unsqueeze(1)
    (order, begin), sizes = groups.in_order, groups.sizes.unsqueeze(1)
    longest = tokens if groups.found is not None else int(sizes.max())
    rank = torch.arange(longest, device=device)
    token = order[(begin[:-1].unsqueeze(1) + rank).clamp(max=rows * tokens - 1)]
    return token, rank < sizes
