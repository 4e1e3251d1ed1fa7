# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
"""Triton kernels behind `depth_statistics` and `token_sums`. Imported only where Triton runs.

Four kernels, in this order:

1. `_walk_kernel` follows a tile of tokens and features through depth, reads every state once, and leaves sums over the
   features of the tile: ‖h‖², ‖Δh‖², Σ|second difference|, Σ std. All in float32.
2. `_finish_kernel` adds the tiles up in float64 and writes the maps, and the inverse lengths of h and Δh. A token whose
   float32 sums cannot be trusted (non-finite, near over- or underflow, or a distance that cancels) is read again and
   computed in float64; nobody waits to learn which.
3. `_sum_kernel` sums unit vectors over chunks of the tokens of a group.
4. `_total_kernel` adds the chunks in float64.

Every sum has a fixed order, only integers are added atomically: the same input gives the same bits.

Letters: S states, N = B·T tokens, D features, G groups, F feature blocks, C chunks. Strides come divided by ALIGN, so
that the compiler knows what divides them without compiling once per T.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from repflow.triton_kernels.groups import find_groups

_TINY, _HUGE = 1e-24, 1e36  # Sums of squares in float32 outside these may have lost digits.
_TINY_SPREAD = 1e-12
_ROUNDING = 3e-7  # Bound on the relative error of a float32 sum of squares as the walk takes it.


@triton.jit
def _token_offset(n, row_tokens, stride_b, stride_t, ALIGN: tl.constexpr):
    """Offset of tokens `n` of the flattened batch, in elements, as int64."""
    row = n // row_tokens
    return (row.to(tl.int64) * stride_b + (n - row * row_tokens).to(tl.int64) * stride_t) * ALIGN


@triton.jit
def _valid_tokens(valid, n, num_tokens, HAS_MASK: tl.constexpr):
    inside = n < num_tokens
    if HAS_MASK:
        inside = inside & (tl.load(valid + n, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _only_if(flag, mask):
    """`mask & flag` of a scalar flag, which Triton's interpreter would turn into integers."""
    return tl.where(flag, mask, mask != mask)


@triton.jit
def _tile_sum(x):
    """[R, BT, W] -> [BT]: first what a thread holds itself, then across the few lanes of a token."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit(
    do_not_specialize=["num_states", "num_tokens", "row_tokens", "stride_s", "stride_b", "stride_t"],
)
def _walk_kernel(
    states,  # [S, B, T, D]
    valid,  # [N] uint8
    square,  # [S, F, N] float32
    update,  # [S-1, F, N] float32
    bend,  # [S-2, F, N] float32
    spread,  # [F, N] float32
    num_states,
    num_tokens,
    row_tokens,
    stride_s,
    stride_b,
    stride_t,
    D: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WITH_DEPTH: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    block = pid % F
    n = pid // F * BT + tl.arange(0, BT)
    inside = n < num_tokens
    feature = block * R * W + tl.arange(0, R)[:, None, None] * W + tl.arange(0, W)[None, None, :]
    used = _valid_tokens(valid, n, num_tokens, HAS_MASK)[None, :, None]
    if D % (R * W) != 0:
        used = used & (feature < D)
    pointer = states + _token_offset(n, row_tokens, stride_b, stride_t, ALIGN)[None, :, None] + feature
    step_s = stride_s.to(tl.int64) * ALIGN

    plane = num_tokens.to(tl.int64) * F
    target = block.to(tl.int64) * num_tokens + n

    raw = tl.load(pointer, mask=used, other=0.0)
    first = raw.to(tl.float32)
    tl.store(square + target, _tile_sum(first * first), mask=inside)
    before = first
    change_before = first * 0.0
    total = tl.zeros_like(first)
    total_square = tl.zeros_like(first)
    if AHEAD:
        raw = tl.load(pointer + step_s, mask=_only_if(num_states > 1, used), other=0.0)
    for s in tl.range(1, num_states, num_stages=STAGES):
        if AHEAD:
            here = raw.to(tl.float32)
            raw = tl.load(pointer + (s + 1) * step_s, mask=_only_if(s + 1 < num_states, used), other=0.0)
        else:
            here = tl.load(pointer + s * step_s, mask=used, other=0.0).to(tl.float32)
        change = here - before
        tl.store(square + s * plane + target, _tile_sum(here * here), mask=inside)
        tl.store(update + (s - 1) * plane + target, _tile_sum(change * change), mask=inside)
        if WITH_DEPTH:
            bent = _tile_sum(tl.abs(change - change_before))
            tl.store(bend + (s - 2) * plane + target, bent, mask=_only_if(s >= 2, inside))
            change_before = change
            away = here - first
            total += away
            total_square += away * away
        before = here
    if WITH_DEPTH:
        count = num_states.to(tl.float32)
        variance = (total_square - total * total / count) / count
        variance = tl.where(variance < 0, 0.0, variance)  # keeps NaN, unlike tl.maximum
        tl.store(spread + target, _tile_sum(tl.sqrt(variance)), mask=inside)


@triton.jit
def _add_blocks(partial, n, num_tokens, used, F: tl.constexpr, BF: tl.constexpr):
    """[F, N] -> [BT] in float64."""
    block = tl.arange(0, BF)
    pointer = partial + block.to(tl.int64)[:, None] * num_tokens + n[None, :]
    return tl.sum(tl.load(pointer, mask=used[None, :] & (block < F)[:, None], other=0.0).to(tl.float64), axis=0)


@triton.jit
def _in_range(square, TINY: tl.constexpr, HUGE: tl.constexpr):
    return (square >= TINY) & (square <= HUGE)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")  # x − x would be contracted with the product that x came from


@triton.jit(
    do_not_specialize=["num_states", "num_tokens", "row_tokens", "stride_s", "stride_b", "stride_t"],
)
def _finish_kernel(
    states,  # [S, B, T, D]
    valid,  # [N] uint8
    square,  # [S, F, N] float32
    update,  # [S-1, F, N] float32
    bend,  # [S-2, F, N] float32
    spread,  # [F, N] float32
    norm_map,  # [S, N] float32
    cosine_map,  # [S-1, N] float32
    distance_map,  # [S-1, N] float32
    curvature_map,  # [S-2, N] float32
    spread_map,  # [N] float32
    weight,  # [S, N] float32
    update_weight,  # [S-1, N] float32
    counts,  # [2, S] int64: non-finite, zero
    num_states,
    num_tokens,
    row_tokens,
    stride_s,
    stride_b,
    stride_t,
    D: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WITH_DEPTH: tl.constexpr,
    WITH_WEIGHTS: tl.constexpr,
    TINY: tl.constexpr,
    HUGE: tl.constexpr,
    TINY_SPREAD: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    s = tl.program_id(1)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = n < num_tokens
    used = _valid_tokens(valid, n, num_tokens, HAS_MASK)
    plane = num_tokens.to(tl.int64) * F
    nan = float("nan")
    column = tl.arange(0, BD)[None, :]
    origin = states + _token_offset(n, row_tokens, stride_b, stride_t, ALIGN)[:, None] + column
    step_s = stride_s.to(tl.int64) * ALIGN
    if s < num_states:
        next1 = s + 1 < num_states
        next2 = s + 2 < num_states
        a = _add_blocks(square + s * plane, n, num_tokens, used, F, BF)
        b = _add_blocks(square + (s + 1) * plane, n, num_tokens, _only_if(next1, used), F, BF)
        u = _add_blocks(update + s * plane, n, num_tokens, _only_if(next1, used), F, BF)
        product = 2 * tl.sqrt(a) * tl.sqrt(b)
        between = tl.sqrt(a) - tl.sqrt(b)
        distance = (u - between * between) / product
        error = ROUNDING * (u + tl.abs(a - b)) / product
        allowed = tl.minimum(tl.maximum(5e-4 * distance, 5e-9), 3e-6)
        doubtful = ~_in_range(a, TINY, HUGE)
        trusted = _in_range(b, TINY, HUGE) & _in_range(u, TINY, HUGE) & (error <= allowed)
        doubtful = doubtful | _only_if(next1, ~trusted)
        doubtful = doubtful & used
        if tl.max(doubtful.to(tl.int32), axis=0) > 0:
            exact_a = tl.zeros((BT,), tl.float64)
            exact_b = tl.zeros((BT,), tl.float64)
            exact_u = tl.zeros((BT,), tl.float64)
            exact_distance = tl.zeros((BT,), tl.float64)
            for start in range(0, D, BD):
                here = doubtful[:, None] & (column + start < D)
                pointer = origin + s * step_s + start
                x = tl.load(pointer, mask=here, other=0.0).to(tl.float64)
                y = tl.load(pointer + step_s, mask=_only_if(next1, here), other=0.0).to(tl.float64)
                exact_a += tl.sum(x * x, axis=1)
                exact_b += tl.sum(y * y, axis=1)
                exact_u += tl.sum((y - x) * (y - x), axis=1)
            # Where there is no direction the distance is not used: 1 instead of a division by zero.
            length_a = tl.sqrt(tl.where((exact_a > 0) & _is_finite(exact_a), exact_a, 1.0))[:, None]
            length_b = tl.sqrt(tl.where((exact_b > 0) & _is_finite(exact_b), exact_b, 1.0))[:, None]
            for start in range(0, D, BD):
                here = doubtful[:, None] & (column + start < D)
                pointer = origin + s * step_s + start
                x = tl.load(pointer, mask=here, other=0.0).to(tl.float64)
                y = tl.load(pointer + step_s, mask=_only_if(next1, here), other=0.0).to(tl.float64)
                turn = x / length_a - y / length_b
                exact_distance += tl.sum(turn * turn, axis=1) * 0.5
            a = tl.where(doubtful, exact_a, a)
            b = tl.where(doubtful, exact_b, b)
            u = tl.where(doubtful, exact_u, u)
            distance = tl.where(doubtful, exact_distance, distance)
        finite = used & _is_finite(a)
        both = finite & _is_finite(b)
        length = tl.sqrt(a)
        if WITH_DEPTH:
            target = s.to(tl.int64) * num_tokens + n
            tl.store(norm_map + target, tl.where(finite, length, nan).to(tl.float32), mask=inside)
            directed = both & (a > 0) & (b > 0)
            cosine = tl.where(directed, 1 - distance, nan).to(tl.float32)
            tl.store(cosine_map + target, cosine, mask=_only_if(next1, inside))
            distance = tl.where(directed, distance, nan).to(tl.float32)
            tl.store(distance_map + target, distance, mask=_only_if(next1, inside))
            bent = _add_blocks(bend + s * plane, n, num_tokens, _only_if(next2, used), F, BF) * (0.5 / D)
            # Differences with something non-finite are non-finite.
            bent = tl.where(used & _is_finite(bent), bent, nan).to(tl.float32)
            tl.store(curvature_map + target, bent, mask=_only_if(next2, inside))
            tl.atomic_add(counts + s, tl.sum((used & ~finite).to(tl.int64), axis=0))
            tl.atomic_add(counts + num_states + s, tl.sum((finite & (a == 0)).to(tl.int64), axis=0))
        if WITH_WEIGHTS:
            target = s.to(tl.int64) * num_tokens + n
            directed = finite & (a > 0)
            inverse = tl.where(directed, 1 / tl.sqrt(tl.where(directed, a, 1.0)), 0.0)
            tl.store(weight + target, inverse.to(tl.float32), mask=inside)
            moved = both & (u > 0)
            inverse = tl.where(moved, 1 / tl.sqrt(tl.where(moved, u, 1.0)), 0.0)
            tl.store(update_weight + target, inverse.to(tl.float32), mask=_only_if(next1, inside))
    elif WITH_DEPTH:
        wide = _add_blocks(spread, n, num_tokens, used, F, BF)
        doubtful = used & ~((wide >= TINY_SPREAD * D) & (wide <= HUGE))
        if tl.max(doubtful.to(tl.int32), axis=0) > 0:
            exact = tl.zeros((BT,), tl.float64)
            for start in range(0, D, BD):
                here = doubtful[:, None] & (column + start < D)
                first = tl.load(origin + start, mask=here, other=0.0).to(tl.float64)
                total = tl.zeros((BT, BD), tl.float64)
                total_square = tl.zeros((BT, BD), tl.float64)
                for layer in range(0, num_states):
                    away = tl.load(origin + layer * step_s + start, mask=here, other=0.0).to(tl.float64) - first
                    total += away
                    total_square += away * away
                variance = (total_square - total * total / num_states) / num_states
                exact += tl.sum(tl.sqrt(tl.where(variance < 0, 0.0, variance)), axis=1)
            wide = tl.where(doubtful, exact, wide)
        wide = tl.where(used & _is_finite(wide), wide / D, nan)
        tl.store(spread_map + n, wide.to(tl.float32), mask=inside)


@triton.jit(
    do_not_specialize=[
        "num_states",
        "num_tokens",
        "row_tokens",
        "stride_s",
        "stride_b",
        "stride_t",
        "pieces",
        "chunks",
        "span",
    ],
)
def _sum_kernel(
    states,  # [S, B, T, D]
    weight,  # [S, N] float32
    update_weight,  # [S-1, N] float32
    order,  # [N] int64: tokens, group by group
    begin,  # [G + 1] int64: where each group begins in `order`
    sums,  # [S, G, C, D] float32
    update_sums,  # [S-1, G, C, D] float32
    used,  # [S, G, C] int32
    update_used,  # [S-1, G, C] int32
    num_states,
    num_tokens,
    row_tokens,
    stride_s,
    stride_b,
    stride_t,
    pieces,  # G · C
    chunks,
    span,  # tokens of a chunk
    D: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    block = pid % tl.cdiv(D, BD)
    piece = pid // tl.cdiv(D, BD)
    s = piece // pieces * BS + tl.arange(0, BS)
    piece = piece % pieces
    group = piece // chunks
    feature = block * BD + tl.arange(0, BD)
    if HAS_ORDER:
        low = tl.load(begin + group)
        high = tl.load(begin + group + 1)
    else:
        low = group.to(tl.int64) * row_tokens
        high = low + row_tokens
    low = low + (piece % chunks).to(tl.int64) * span
    high = tl.minimum(high, low + span)
    inside = s < num_states
    moves = s + 1 < num_states
    layer = s.to(tl.int64)
    step_s = stride_s.to(tl.int64) * ALIGN
    origin = states + layer[:, None, None] * step_s + feature[None, None, :]
    known = (feature < D)[None, None, :]
    total = tl.zeros((BS, BT, BD), tl.float32)
    update_total = tl.zeros((BS, BT, BD), tl.float32)
    count = tl.zeros((BS, BT), tl.int32)
    update_count = tl.zeros((BS, BT), tl.int32)
    for at in tl.range(low, high, BT, num_stages=STAGES):
        entry = at + tl.arange(0, BT)
        here = entry < high
        n = entry
        if HAS_ORDER:
            n = tl.load(order + entry, mask=here, other=0)
        cell = layer[:, None] * num_tokens + n[None, :]
        w = tl.load(weight + cell, mask=inside[:, None] & here[None, :], other=0.0)
        v = tl.load(update_weight + cell, mask=moves[:, None] & here[None, :], other=0.0)
        pointer = origin + _token_offset(n.to(tl.int32), row_tokens, stride_b, stride_t, ALIGN)[None, :, None]
        moved = (v > 0)[:, :, None]
        # A token without a direction may hold anything: it is not read.
        x = tl.load(pointer, mask=((w > 0)[:, :, None] | moved) & known, other=0.0).to(tl.float32)
        y = tl.load(pointer + step_s, mask=moved & known, other=0.0).to(tl.float32)
        total += x * w[:, :, None]
        update_total += (y - x) * v[:, :, None]
        count += (w > 0).to(tl.int32)
        update_count += (v > 0).to(tl.int32)
    target = (layer * pieces + piece) * D
    target = target[:, None] + feature[None, :]
    tl.store(sums + target, tl.sum(total, axis=1), mask=inside[:, None] & (feature < D)[None, :])
    tl.store(update_sums + target, tl.sum(update_total, axis=1), mask=moves[:, None] & (feature < D)[None, :])
    if block == 0:
        tl.store(used + layer * pieces + piece, tl.sum(count, axis=1), mask=inside)
        tl.store(update_used + layer * pieces + piece, tl.sum(update_count, axis=1), mask=moves)


@triton.jit(do_not_specialize=["num_states", "chunks"])
def _total_kernel(
    sums,  # [S, G, C, D] float32
    update_sums,  # [S-1, G, C, D] float32
    used,  # [S, G, C] int32
    update_used,  # [S-1, G, C] int32
    unit_sum,  # [S, G, D] float64
    count,  # [S, G] int64
    update_unit_sum,  # [S-1, G, D] float64
    update_count,  # [S-1, G] int64
    num_states,
    chunks,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    feature = tl.program_id(1) * BD + tl.arange(0, BD)
    known = feature < D
    cell = tl.program_id(0)  # s · G + g
    moves = cell < (num_states - 1) * (tl.num_programs(0) // num_states)
    total = tl.zeros((BD,), tl.float64)
    update_total = tl.zeros((BD,), tl.float64)
    number = tl.zeros((), tl.int64)
    update_number = tl.zeros((), tl.int64)
    for chunk in range(0, chunks):
        piece = cell.to(tl.int64) * chunks + chunk
        total += tl.load(sums + piece * D + feature, mask=known, other=0.0).to(tl.float64)
        update_total += tl.load(update_sums + piece * D + feature, mask=_only_if(moves, known), other=0.0).to(
            tl.float64
        )
        number += tl.load(used + piece).to(tl.int64)
        update_number += tl.load(update_used + piece, mask=moves, other=0).to(tl.int64)
    target = cell.to(tl.int64) * D + feature
    tl.store(unit_sum + target, total, mask=known)
    tl.store(update_unit_sum + target, update_total, mask=_only_if(moves, known))
    if tl.program_id(1) == 0:
        tl.store(count + cell, number)
        tl.store(update_count + cell, update_number, mask=moves)


@dataclass(frozen=True)
class Settings:
    """Block sizes and warps; fixed for a shape class, since measuring at run time would make results vary."""

    walk: tuple[int, int, int] = (1, 4, 256)
    """R, BT, W: features per tile are R·W."""
    walk_warps: int = 4
    walk_ahead: bool = True
    walk_stages: int = 1
    finish_tokens: int = 64
    sum_block: tuple[int, int, int] = (4, 4, 128)
    """BS, BT, BD."""
    sum_warps: int = 4
    sum_stages: int = 3
    span: int = 256
    """Tokens per chunk."""


def choose_settings(dtype: torch.dtype, features: int) -> Settings:
    """The settings of a shape class."""
    width = min(256, max(8, triton.next_power_of_2(features)))
    block = min(128, width)
    return Settings(walk=(1, min(64, 1024 // width), width), sum_block=(4, 4, block))


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


def describe_tokens(states: Tensor, mask: Tensor | None) -> Tokens:
    """What a mask that fits the states says. On a GPU, reading an integer one waits for the device."""
    if mask is None:
        return Tokens(None, states.shape[1])
    if mask.dtype == torch.bool:
        return Tokens(mask.contiguous().view(torch.uint8), states.shape[1])
    groups = find_groups(mask)
    valid = (groups.index >= 0).view(torch.uint8)
    if groups.by_row:
        return Tokens(valid, groups.count)
    sorted_index, order = torch.where(groups.index < 0, groups.count, groups.index).flatten().sort(stable=True)
    begin = torch.searchsorted(sorted_index, torch.arange(groups.count + 1, device=mask.device))
    return Tokens(valid, groups.count, order, begin)


@torch.no_grad()
def stream(
    states: Tensor, mask: Tensor | None, *, depth: bool, sums: bool, settings: Settings | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The fields of `DepthStatistics` and of `TokenSums`, each empty unless asked for."""
    with torch.cuda.device(states.device) if states.is_cuda else nullcontext():
        return _stream(states, describe_tokens(states, mask), depth, sums, settings)


def _stream(
    states: Tensor, tokens: Tokens, depth: bool, sums: bool, settings: Settings | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    num_states, rows, row_tokens, features = states.shape
    num_tokens = rows * row_tokens
    settings = choose_settings(states.dtype, features) if settings is None else settings
    device = states.device
    strides = states.stride()[:3]
    align = math.gcd(16 // states.element_size(), *strides)
    sizes = (num_states, num_tokens, row_tokens, *(stride // align for stride in strides))
    r, block_tokens, width = settings.walk
    blocks = triton.cdiv(features, r * width)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    s, n = num_states, num_tokens
    square, update = empty(s, blocks, n), empty(s - 1, blocks, n)
    bend, spread = (empty(max(s - 2, 0), blocks, n), empty(blocks, n)) if depth else (square, square)
    valid = square if tokens.valid is None else tokens.valid
    has_mask = tokens.valid is not None
    shared = dict(D=features, F=blocks, ALIGN=align, HAS_MASK=has_mask, WITH_DEPTH=depth)
    _walk_kernel[(triton.cdiv(n, block_tokens) * blocks,)](
        states, valid, square, update, bend, spread, *sizes, R=r, BT=block_tokens, W=width,
        AHEAD=settings.walk_ahead, STAGES=settings.walk_stages, num_warps=settings.walk_warps, **shared,
    )  # fmt: skip

    maps: tuple[Tensor, ...] = ()
    counts = square
    if depth:
        maps = (empty(s, n), empty(s - 1, n), empty(s - 1, n), empty(max(s - 2, 0), n), empty(n))
        counts = torch.zeros(2, s, dtype=torch.int64, device=device)
    weight, update_weight = (empty(s, n), empty(s - 1, n)) if sums else (square, square)
    _finish_kernel[(triton.cdiv(n, settings.finish_tokens), s + depth)](
        states, valid, square, update, bend, spread, *(maps or (square,) * 5), weight, update_weight, counts, *sizes,
        BF=triton.next_power_of_2(blocks), BT=settings.finish_tokens, BD=32, WITH_WEIGHTS=sums,
        TINY=_TINY, HUGE=_HUGE, TINY_SPREAD=_TINY_SPREAD, ROUNDING=_ROUNDING, num_warps=4, **shared,
    )  # fmt: skip
    if depth:
        maps = (*(entry.unflatten(-1, (rows, row_tokens)) for entry in maps), counts[0], counts[1])
    if not sums:
        return maps, ()

    span = settings.span if tokens.order is None else n
    chunks = triton.cdiv(row_tokens, span) if tokens.order is None else 1
    groups = tokens.groups
    parts = (empty(s, groups, chunks, features), empty(s - 1, groups, chunks, features))
    parts += tuple(empty(layers, groups, chunks, dtype=torch.int32) for layers in (s, s - 1))
    results = (
        empty(s, groups, features, dtype=torch.float64),
        empty(s, groups, dtype=torch.int64),
        empty(s - 1, groups, features, dtype=torch.float64),
        empty(s - 1, groups, dtype=torch.int64),
    )
    if groups == 0:
        return maps, results
    block_states, sum_tokens, sum_width = settings.sum_block
    order = square if tokens.order is None else tokens.order
    begin = square if tokens.begin is None else tokens.begin
    _sum_kernel[(triton.cdiv(features, sum_width) * triton.cdiv(s, block_states) * groups * chunks,)](
        states, weight, update_weight, order, begin, *parts, *sizes, groups * chunks, chunks, span, D=features,
        BS=block_states, BT=sum_tokens, BD=sum_width, ALIGN=align, HAS_ORDER=tokens.order is not None,
        STAGES=settings.sum_stages, num_warps=settings.sum_warps,
    )  # fmt: skip
    total_width = min(256, triton.next_power_of_2(features))
    _total_kernel[(s * groups, triton.cdiv(features, total_width))](
        *parts, *results, num_states, chunks, D=features, BD=total_width, num_warps=2
    )
    return maps, results
