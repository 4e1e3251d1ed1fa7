"""HSIC of every pair of states in Triton: one look at the states for their means, one for the norms, then Gram tiles.

The unbiased estimator is an inner product of U-centred Grams: HSIC₁ = Σ_{i≠j} K^U_ij L^U_ij/(n(n − 3)) with
K^U_ij = K_ij + a_i/(n − 2) + a_j/(n − 2) − Σa/((n − 1)(n − 2)) and a_i = ‖c_i‖² of the centred tokens c: row i of K
sums to −a_i without its diagonal. The shifts are added before an entry is rounded, so that nothing cancels afterwards.
Tiles of the Gram are added up in fp64.
"""

# Triton's language is typed for its compiler, not for pyright.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from repflow.triton_kernels import _hsic_gram
from repflow.triton_kernels._hsic_centre import SCAN, Centre, alignment, centre
from repflow.triton_kernels._hsic_gram import Pass, tiles_of
from repflow.triton_kernels._sizes import ceil_div, power_of_2

MAX_STATES = 256
"""The contraction holds all pairs of states on chip."""

_SUMS_BYTES = 48 * 2**20
"""Partial sums over tokens, or over tiles; groups beyond that are worked through in turn, and one group is not cut."""

_MAX_GROUPS = 2**15
"""What a launch takes in its third dimension is 2¹⁶ − 1."""

_NORM = (8, 128, 2, 3)
"""Tokens, features, warps and stages of the look at all norms."""

_ROUNDING = {True: 2.0**-20, False: 2.0**-7}
"""Rounding of an operand, by whether the kernels are fp32. Of states without structure (one token differs from all
others), n entries of the U-centred Gram are left, each this small relative to Σa/n."""


@triton.jit(do_not_specialize=["stride_s", "stride_b", "stride_t", "T", "G", "n"])
def _norm_kernel(
    x,  # [S, B, T, D] by strides
    token,  # [G, n]
    count,  # [G]
    alive,  # [S, G]
    scale,  # [S, G]
    mean,  # [S, G, D] scaled
    square,  # [S, G, n] a = ‖c‖², scaled; 0 beyond the tokens
    edge,  # [4 or 1, S, G, n] what to add to the Gram: row and column if both operands are centred; row and column of
    # the raw one; row of the one-sided one
    length,  # [S, G] ‖m‖²
    stride_s,
    stride_b,
    stride_t,
    T,
    G,
    n,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
    UNBIASED: tl.constexpr,
    FP32: tl.constexpr,
):
    block, s, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group = s * G + g
    i = block * BT + tl.arange(0, BT)
    number = tl.load(count + g).to(tl.int32)
    keep = i < number
    position = tl.load(token + g * n + i, mask=keep, other=0)
    rows = s * stride_s + (position // T) * stride_b + (position % T) * stride_t
    if ALIGN > 1:
        rows = tl.multiple_of(rows, ALIGN)
    k = tl.load(scale + group)
    a = tl.full([BT, BD], 0.0, tl.float32)
    mm = tl.full([BD], 0.0, tl.float32)
    if not FP32:
        along = tl.full([BT, BD], 0.0, tl.float32)  # c · m
        rounded_a = tl.full([BT, BD], 0.0, tl.float32)  # ĉ · c
        rounded_along = tl.full([BT, BD], 0.0, tl.float32)  # ĉ · m
    # Nothing is read where a short group has no tokens; the first block takes the length of the mean all the same.
    wanted = (block == 0) | (block * BT < number)
    width = tl.where(wanted, D, 0)
    for d0 in tl.range(0, width, BD, num_stages=STAGES):
        d = d0 + tl.arange(0, BD)
        inside = d < D
        raw = tl.load(x + rows[:, None] + d[None, :], mask=keep[:, None] & inside[None, :], other=0.0)
        m = tl.load(mean + group * D + d, mask=inside, other=0.0)
        c = raw.to(tl.float32) * k - m[None, :]
        a += c * c
        mm += m * m
        if not FP32:
            rounded = c.to(x.dtype.element_ty).to(tl.float32)
            along += c * m[None, :]
            rounded_a += rounded * c
            rounded_along += rounded * m[None, :]
    squared, total = tl.sum(a, 1), tl.sum(mm, 0)
    tl.store(length + group, total, mask=wanted)
    out, plane = group * n + i, tl.num_programs(1).to(tl.int64) * G * n
    lives = tl.load(alive + group) != 0
    tl.store(square + out, tl.where(keep & lives, squared, 0.0), mask=i < n)
    share = 0.0
    if UNBIASED:
        share = 1.0 / (number - 2).to(tl.float32)
    added = squared * share
    tl.store(edge + out, added, mask=keep)
    if not FP32:
        sideways = tl.sum(along, 1)
        tl.store(edge + plane + out, added - sideways - total, mask=keep)
        tl.store(edge + 2 * plane + out, added - sideways, mask=keep)
        tl.store(edge + 3 * plane + out, tl.sum(rounded_a, 1) * share - tl.sum(rounded_along, 1), mask=keep)


@triton.jit(do_not_specialize=["G", "n"])
def _moment_kernel(
    square,  # [S, G, n]
    scale,  # [S, G]
    count,  # [G]
    length,  # [S, G]
    total,  # [S, G] Σa, scaled
    offset,  # [S, G] what to add to every entry of the Gram
    shrink,  # [S, G] the power of two that brings the largest entry of the Gram to 2¹³ … 2¹⁵
    hard,  # [S, G] whether the raw Gram would lose too much to its mean, or leave fp32
    fourth,  # [G, S] Σa²
    fourth_max,  # [G, S]
    G,
    n,
    UNBIASED: tl.constexpr,
    FP32: tl.constexpr,
    BT: tl.constexpr,
):
    s, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    group = s * G + g
    one = tl.full([BT], 0.0, tl.float64)
    two = tl.full([BT], 0.0, tl.float64)
    most = tl.full([BT], 0.0, tl.float32)
    for start in range(0, n, BT):
        i = start + tl.arange(0, BT)
        a = tl.load(square + group * n + i, mask=i < n, other=0.0)
        most = tl.maximum(most, a)
        a = a.to(tl.float64)
        one += a
        two += a * a
    k = tl.load(scale + group)
    grow = 1.0 / k.to(tl.float64)
    grow = grow * grow
    grow = grow * grow
    place = g * tl.num_programs(0) + s
    largest = tl.max(most, 0)
    tl.store(fourth + place, tl.sum(two, 0) * grow)
    tl.store(fourth_max + place, largest.to(tl.float64) * largest.to(tl.float64) * grow)
    every = tl.sum(one, 0)
    tl.store(total + group, every)
    examples = tl.load(count + g).to(tl.float64)
    if UNBIASED:
        tl.store(offset + group, (-every / ((examples - 1) * (examples - 2))).to(tl.float32))
    else:
        tl.store(offset + group, 0.0)
    if not FP32:
        # |K^U| ≤ 8/3 of the largest a for n ≥ 4.
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 126
        exponent = tl.where(largest > 0, tl.minimum(tl.maximum(exponent, -100), 100), 0)
        tl.store(shrink + group, ((127 + 13 - exponent) << 23).to(tl.float32, bitcast=True))
        far = tl.load(length + group).to(tl.float64) * examples > 16 * every
        tl.store(hard + group, (far | (k > 2.0**50) | (k < 2.0**-50)).to(tl.int32))


@triton.jit(do_not_specialize=["S", "G", "pieces", "few_piece", "few", "min_tokens"])
def _finish_kernel(
    inner,  # [G, pieces, S, S] Σ K L over i < j
    extra,  # [G, S, S] fp64 Σ a b; not read if unbiased
    total,  # [S, G] fp64
    length,  # [S, G]
    scale,  # [S, G]
    shrink,  # [S, G]; not read if FP32
    alive,  # [S, G]
    count,  # [G]
    hsic,  # [G, S, S] fp64
    S,
    G,
    pieces,
    few_piece,  # where the pieces of groups with few tokens begin
    few,  # up to how many tokens that is
    min_tokens,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    PARTS: tl.constexpr,
    FEW_BI: tl.constexpr,
    FEW_BJ: tl.constexpr,
    FEW_PARTS: tl.constexpr,
    ROUNDING: tl.constexpr,
    FEW_ROUNDING: tl.constexpr,
    MEAN_ROUNDING: tl.constexpr,
    UNBIASED: tl.constexpr,
    FP32: tl.constexpr,
    BP: tl.constexpr,
    BE: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    inside = e < S * S
    n = tl.load(count + g)
    examples = n.to(tl.float64)
    short = n <= few
    begin = tl.where(short, few_piece, 0)
    number = n.to(tl.int32)
    there = tl.where(short, tiles_of(number, FEW_BI, FEW_BJ) * FEW_PARTS, tiles_of(number, BI, BJ) * PARTS)
    summed = tl.full([BP, BE], 0.0, tl.float64)
    for start in range(0, there, BP):
        p = start + tl.arange(0, BP)
        place = inner + (g * pieces + begin + p[:, None]) * S * S + e[None, :]
        summed += tl.load(place, mask=(p[:, None] < there) & inside[None, :], other=0.0).to(tl.float64)
    value = 2 * tl.sum(summed, 0)
    a, b = (e // S) * G + g, (e % S) * G + g
    if not FP32:
        grow_a = tl.load(shrink + a, mask=inside, other=1.0).to(tl.float64)
        grow_b = tl.load(shrink + b, mask=inside, other=1.0).to(tl.float64)
        value = tl.where(short, value, value / grow_a / grow_b)
    if UNBIASED:
        # A self-HSIC within the rounding of its entries is zero: states without structure must not look related.
        squares = tl.load(total + a, mask=inside, other=0.0)
        # n entries of a row; what is left of the mean, whose rounding is 2⁻²² of it, meets that row's token.
        rounding = tl.where(short, FEW_ROUNDING * FEW_ROUNDING, ROUNDING * ROUNDING)
        operands = rounding * squares * squares / examples
        means = MEAN_ROUNDING * MEAN_ROUNDING * tl.load(length + a, mask=inside, other=0.0) * squares * examples
        value = tl.where((a == b) & (value <= operands + means), 0.0, value) / (examples * (examples - 3))
    else:
        value = (value + tl.load(extra + g * S * S + e, mask=inside, other=0.0)) / ((examples - 1) * (examples - 1))
    ka = tl.load(scale + a, mask=inside, other=1.0).to(tl.float64)
    kb = tl.load(scale + b, mask=inside, other=1.0).to(tl.float64)
    value = value / (ka * ka) / (kb * kb)
    lives = (tl.load(alive + a, mask=inside, other=0) != 0) & (tl.load(alive + b, mask=inside, other=0) != 0)
    value = tl.where(lives & (n >= min_tokens), value, float("nan"))
    tl.store(hsic + g * S * S + e, value, mask=inside)


def _norms(
    states: Tensor, middle: Centre, unbiased: bool, fp32: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """What the Gram needs (`edge`, `offset`, `shrink`, `hard`), the end (Σa, a, ‖m‖²), and the fourth moments."""
    S, _, T, D = states.shape
    G, n = middle.token.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=states.device)

    square, edge = empty(S, G, n), empty(1 if fp32 else 4, S, G, n)
    length, offset, shrink, hard = empty(S, G), empty(S, G), empty(S, G), empty(S, G, dtype=torch.int32)
    total, fourth, fourth_max = (empty(*shape, dtype=torch.float64) for shape in ((S, G), (G, S), (G, S)))
    BT, BD, warps, stages = _NORM
    _norm_kernel[(ceil_div(n, BT), S, G)](
        states, middle.token, middle.count, middle.alive, middle.scale, middle.mean, square, edge, length,
        *states.stride()[:3], T, G, n,
        D=D, BT=BT, BD=min(BD, power_of_2(D)), STAGES=stages, ALIGN=alignment(states),
        UNBIASED=unbiased, FP32=fp32, num_warps=warps,
    )  # fmt: skip
    _moment_kernel[(S, G)](
        square, middle.scale, middle.count, length, total, offset, shrink, hard, fourth, fourth_max, G, n,
        UNBIASED=unbiased, FP32=fp32, BT=1024, num_warps=4,
    )  # fmt: skip
    return (edge, offset, shrink, hard), (total, square, length), (fourth, fourth_max)


def _of_groups(
    states: Tensor, token: Tensor, member: Tensor, estimator: str, min_tokens: int, passes: tuple[Pass, Pass]
) -> tuple[Tensor, ...]:
    S, G = states.shape[0], token.shape[0]
    long, few = passes
    unbiased, fp32 = estimator == "unbiased", long.tiling.fp32
    middle = centre(states, token, member)
    shifts, (total, square, length), fourth = _norms(states, middle, unbiased, fp32)
    inner = torch.empty(G, few.end, S, S, dtype=torch.float32, device=states.device)
    for piece in passes:
        if piece.high:
            _hsic_gram.add_inner_products(inner, states, middle, *shifts, piece)
    hsic = torch.empty(G, S, S, dtype=torch.float64, device=states.device)
    extra = hsic
    if not unbiased:
        wide = square.transpose(0, 1).double()
        extra = wide @ wide.mT
    _finish_kernel[(ceil_div(S * S, 32), G)](
        inner, extra, total, length, middle.scale, shifts[2], middle.alive, middle.count, hsic,
        S, G, few.end, few.first_piece, few.high, min_tokens,
        BI=long.tiling.rows, BJ=long.tiling.columns, PARTS=long.tiling.parts,
        FEW_BI=few.tiling.rows, FEW_BJ=few.tiling.columns, FEW_PARTS=few.tiling.parts,
        ROUNDING=_ROUNDING[long.tiling.fp32], FEW_ROUNDING=_ROUNDING[True], MEAN_ROUNDING=2.0**-22,
        UNBIASED=unbiased, FP32=fp32, BP=32, BE=32, num_warps=4,
    )  # fmt: skip
    return hsic, middle.count, *fourth


@torch.no_grad()
def hsic_statistics(
    states: Tensor, token: Tensor, member: Tensor, estimator: str, min_tokens: int
) -> tuple[Tensor, ...]:
    """Fields of `HsicStatistics`, from the tokens `[G, n]` of every group and which entries of it are tokens."""
    S, _, _, D = states.shape
    G, n = token.shape
    member = member.contiguous().view(torch.uint8)
    passes = _hsic_gram.plan(n, states)
    largest = 4 * S * max(ceil_div(n, SCAN[0]) * D, passes[1].end * S)
    step = min(_MAX_GROUPS, max(1, _SUMS_BYTES // largest))
    with torch.cuda.device(states.device) if states.is_cuda else nullcontext():
        parts = [
            _of_groups(states, token[g : g + step].contiguous(), member[g : g + step], estimator, min_tokens, passes)
            for g in range(0, G, step)
        ]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))


__all__ = ["MAX_STATES", "hsic_statistics"]
