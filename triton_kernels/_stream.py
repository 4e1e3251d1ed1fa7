# Launch options of Triton's kernels are unknown to pyright.
# pyright: reportCallIssue=false
"""Launches the kernels behind `depth_statistics` and `token_sums`. Imported only where Triton runs.

Four kernels, in this order:

1. `walk_kernel` follows tiles of tokens through depth, reads every state once, and leaves float32 sums per tile.
2. `finish_kernel` adds the tiles up in float64 and writes the maps, and the inverse lengths of h and Δh.
3. `sum_kernel` reads the states again and sums unit vectors over chunks of the tokens of a group.
4. `total_kernel` adds the chunks in float64, and counts.

A unit vector needs the length of the whole token, and V_glob every state of an element: what follows depth cannot know
the one while it still holds the other, so that the states are read twice. Every sum has a fixed order, only integers
are added atomically: the same input gives the same bits.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from repflow.triton_kernels._cohesion_kernels import sum_kernel, total_kernel
from repflow.triton_kernels._depth_kernels import finish_kernel, walk_kernel
from repflow.triton_kernels._sizes import ceil_div, power_of_2
from repflow.triton_kernels.groups import Groups, find_groups

_TINY, _HUGE = 1e-24, 1e36  # Sums of squares in float32 outside these may have lost digits.
_TINY_SPREAD = 1e-12
_ROUNDING = 2e-7  # Relative error of the walk's float32 sums: five times the spread of 32 roundings in a row.
_ALLOWED = 8e-6  # Error of a cosine: what METRICS.md allows, less the rounding of the result.


@dataclass(frozen=True)
class Settings:
    """Block sizes; fixed for a shape class, since measuring at run time would make results vary."""

    walk: tuple[int, int, int] = (4, 4, 64)
    """R, BT, W: tokens, and features as R pieces of W."""
    walk_stages: int = 4
    finish_tokens: int = 64
    finish_warps: int = 2
    sum_features: int = 256
    sum_stages: int = 4
    span: int = 128
    """Most tokens per chunk: a float32 sum must stay short."""
    programs: int = 2048
    """How many programs the sums are cut into, if there are tokens enough."""


def choose_settings(dtype: torch.dtype, features: int, align: int) -> Settings:
    """The settings of a shape class: the widest tile without features to spare.

    Args:
        dtype: of the states.
        features: D.
        align: how many elements the addresses of tokens are multiples of.
    """
    width = min(64 if dtype.itemsize == 2 else 32, max(8, power_of_2(features)))
    if features % width:
        pieces = 4 if features >= 8 * width else 2
    else:
        pieces = next((r for r in (4, 2) if features % (r * width) == 0), 1)
    # A thread must hold two features of a token at least. The product of a single one would be contracted with the sum
    # over the warp, every thread would round its own product, and which of them is stored is nobody's choice.
    if align == 1:
        pieces = max(pieces, 2)
    return Settings(walk=(pieces, 4, width), sum_features=min(256, max(32, power_of_2(features))))


@dataclass(frozen=True)
class Tokens:
    """Which tokens count, and how they fall into groups."""

    valid: Tensor | None
    """[N] uint8; None: all of them."""
    groups: int
    order: Tensor | None = None
    """[N] int64, tokens group by group; None: group g is row g."""
    begin: Tensor | None = None
    """[G + 1] int64, where each group begins in `order`."""


def describe_tokens(states: Tensor, mask: Tensor | Groups | None) -> Tokens:
    """What a mask that fits the states says. On a GPU, reading an integer one waits for the device, groups do not."""
    if mask is None:
        return Tokens(None, states.shape[1])
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return Tokens(mask.contiguous().view(torch.uint8), states.shape[1])
    groups = find_groups(mask) if isinstance(mask, Tensor) else mask
    valid = groups.valid.contiguous().view(torch.uint8)  # the kernels count tokens row by row
    if groups.by_row:
        return Tokens(valid, groups.count)
    return Tokens(valid, groups.count, *groups.in_order)


@dataclass(frozen=True)
class Pieces:
    """How the groups are cut into chunks of `span` tokens, one after the other."""

    count: int
    """Of all groups; documents leave some unused, whose number is known on the device only."""
    span: int
    chunks: int = 0
    """Per group, where groups are rows."""
    first: Tensor | None = None
    """[G + 1] int64: the first piece of each document."""
    group: Tensor | None = None
    """[count] int64: whose piece it is. What is left at the end are pieces of the last group that begin at its end."""


def cut(tokens: Tokens, row_tokens: int, num_tokens: int, wanted: int, longest: int) -> Pieces:
    """About `wanted` pieces, none longer than `longest`."""
    span = max(16, min(longest, num_tokens // max(wanted, 1)))
    if tokens.begin is None:
        chunks = ceil_div(row_tokens, span)
        return Pieces(tokens.groups * chunks, span, chunks)
    first = torch.zeros_like(tokens.begin)
    torch.cumsum((tokens.begin.diff() + span - 1) // span, 0, out=first[1:])
    count = tokens.groups + num_tokens // span
    group = torch.searchsorted(first, torch.arange(count, device=first.device), right=True) - 1
    return Pieces(count, span, first=first, group=group.clamp_(max=tokens.groups - 1))


@torch.no_grad()
def stream(
    states: Tensor, mask: Tensor | Groups | None, *, depth: bool, sums: bool, settings: Settings | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The fields of `DepthStatistics` and of `TokenSums`, each empty unless asked for."""
    with torch.cuda.device(states.device) if states.is_cuda else nullcontext():
        return _stream(states, describe_tokens(states, mask), depth, sums, settings)


def _stream(
    states: Tensor, tokens: Tokens, depth: bool, sums: bool, settings: Settings | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    num_states, rows, row_tokens, features = states.shape
    strides = states.stride()[:3]
    align = math.gcd(16 // states.element_size(), *strides)
    if settings is None:
        settings = choose_settings(states.dtype, features, 1 if states.data_ptr() % 16 else align)
    sizes = (num_states, rows * row_tokens, row_tokens, *(stride // align for stride in strides))
    maps, counts, weights = _walk(states, tokens, sizes, align, depth, sums, settings)
    fields: tuple[Tensor, ...] = ()
    if depth:
        s = num_states
        norm, cosine, distance, curvature, spread = maps.split((s, s - 1, s - 1, s - 2, 1))
        fields = (norm, cosine, distance, curvature, spread[0], counts[0], counts[1])
    return fields, _sum(states, tokens, sizes, align, weights, settings) if sums else ()


def _walk(
    states: Tensor, tokens: Tokens, sizes: tuple[int, ...], align: int, depth: bool, sums: bool, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The maps `[4S-3, B, T]`, the counts `[2, S]`, and the weights `[2S-1, B, T]`; not filled unless asked for."""
    (s, n), shape, features = sizes[:2], states.shape[1:3], states.shape[-1]
    pieces, block_tokens, width = settings.walk
    blocks = ceil_div(features, pieces * width)

    def empty(lead: int, *shape: int) -> Tensor:
        return torch.empty(lead, *shape, dtype=torch.float32, device=states.device)

    partial = empty(3 * s - 2 if depth else 2 * s - 1, blocks, n)
    valid = partial if tokens.valid is None else tokens.valid
    shared = dict(D=features, ALIGN=align, HAS_MASK=tokens.valid is not None, WITH_DEPTH=depth)
    walk_kernel[(ceil_div(n, block_tokens) * blocks,)](
        states, valid, partial, *sizes, R=pieces, BT=block_tokens, W=width, STAGES=settings.walk_stages,
        EXACT=states.dtype.itemsize == 2, num_warps=1, **shared,
    )  # fmt: skip
    maps = empty(4 * s - 3, *shape) if depth else partial
    counts = torch.zeros(2, s, dtype=torch.int64, device=states.device) if depth else partial
    weights = empty(2 * s - 1, *shape) if sums else partial
    finish_kernel[(ceil_div(n, settings.finish_tokens), s + depth)](
        states, valid, partial, maps, weights, counts, *sizes, F=blocks, BT=settings.finish_tokens, BD=64,
        WITH_WEIGHTS=sums, TINY=_TINY, HUGE=_HUGE, TINY_SPREAD=_TINY_SPREAD, ROUNDING=_ROUNDING, ALLOWED=_ALLOWED,
        num_warps=settings.finish_warps, **shared,
    )  # fmt: skip
    return maps, counts, weights


def _sum(
    states: Tensor, tokens: Tokens, sizes: tuple[int, ...], align: int, weights: Tensor, settings: Settings
) -> tuple[Tensor, ...]:
    """The fields of `TokenSums`."""
    (s, n, row_tokens), features, groups = sizes[:3], states.shape[-1], tokens.groups
    unit_sum = torch.empty(2 * s - 1, groups, features, dtype=torch.float64, device=states.device)
    count = torch.empty(2 * s - 1, groups, dtype=torch.int64, device=states.device)
    if groups:
        width = settings.sum_features
        blocks = ceil_div(s, 4) * ceil_div(features, width)
        pieces = cut(tokens, row_tokens, n, settings.programs // blocks, settings.span)
        parts = torch.empty(2 * s - 1, pieces.count, features, dtype=torch.float32, device=states.device)
        order, begin, first, group = (
            weights if entry is None else entry for entry in (tokens.order, tokens.begin, pieces.first, pieces.group)
        )
        documents = tokens.order is not None
        sum_kernel[(blocks * pieces.count,)](
            states, weights, order, begin, first, group, parts, *sizes, pieces.count, pieces.chunks, pieces.span,
            D=features, BD=width, ALIGN=align, DOCUMENTS=documents, STAGES=settings.sum_stages, num_warps=1,
        )  # fmt: skip
        width = min(128, power_of_2(features))
        total_kernel[((2 * s - 1) * groups, ceil_div(features, width))](
            parts, weights, order, begin, first, unit_sum, count, n, row_tokens, groups, pieces.count, pieces.chunks,
            D=features, BD=width, BT=1024, DOCUMENTS=documents, num_warps=1,
        )  # fmt: skip
    return unit_sum[:s], count[:s], unit_sum[s:], count[s:]
