"""The groups of tokens that a mask describes: rows of the batch, or documents in packed rows."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group each token belongs to: its row, or its document in a packed row."""

    index: Int64[Tensor, "B T"]
    """Group of each token, −1 at padding."""
    count: int
    """G, the number of groups."""
    by_row: bool
    """Whether group g is row g, rather than one of several documents."""


def find_groups(mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"]) -> Groups:
    """The groups that `mask` describes.

    A boolean mask, or an integer mask without a value above 1: one group per row. Otherwise one group per document that
    occurs, ordered by row, then by number. Telling the two apart reads the mask: on a GPU an integer mask costs
    synchronisations, a boolean one does not.
    """
    row = torch.arange(mask.shape[0], device=mask.device).unsqueeze(1)
    largest = 1 if mask.dtype == torch.bool or mask.numel() == 0 else int(mask.max())
    if largest <= 1:
        return Groups(torch.where(mask != 0, row, -1), mask.shape[0], by_row=True)
    key = torch.where(mask != 0, row * (largest + 1) + mask, -1)
    documents = torch.unique(key[key >= 0])
    index = torch.where(key >= 0, torch.searchsorted(documents, key), -1)
    return Groups(index, documents.numel(), by_row=False)


def group_members(groups: Groups) -> tuple[Tensor, Tensor]:
    """Index of the tokens of each group in the flattened batch, and which entries are tokens: both `[G, n]`.

    One group per row: the row itself, which needs no look at the mask's values. Documents: gathered, padded to the
    longest.
    """
    rows, tokens = groups.index.shape
    flat = groups.index.flatten()
    everything = torch.arange(flat.numel(), device=flat.device)
    if groups.by_row:
        token = everything.view(rows, tokens)
        return token, groups.index == torch.arange(rows, device=flat.device).unsqueeze(1)
    order = everything[flat >= 0][flat[flat >= 0].argsort(stable=True)]
    sizes = torch.bincount(flat[order], minlength=groups.count)
    longest = int(sizes.max())
    rank = torch.arange(order.numel(), device=flat.device) - (sizes.cumsum(0) - sizes)[flat[order]]
    token = torch.zeros(groups.count, longest, dtype=torch.int64, device=flat.device)
    token[flat[order], rank] = order
    return token, torch.arange(longest, device=flat.device) < sizes.unsqueeze(1)
