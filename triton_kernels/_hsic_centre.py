"""Which tokens of a group count, and their mean at every state: the first steps of HSIC in Triton.

Tokens are packed so that those which count come first: the other kernels then need their number only, and whatever
lies beyond it is never looked at. A state of a group is scaled by the power of two that brings its largest magnitude
to 1, so that squares stay within fp32. Means are sums of differences from the last token, so that equal tokens have
exactly their own value as mean; the last, since the first is often a sink, far from all others.

Letters: S states, B·T tokens, D features, G groups, n entries of the longest group.
"""

# Triton's language is typed for its compiler, not for pyright.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from repflow.triton_kernels._sizes import ceil_div, power_of_2

SCAN = (32, 64, 1, 3)
"""Tokens, features, warps and stages of the look at all states."""


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["token", "member"])
def _pack_kernel(
    token,  # [G, n] position in B·T
    member,  # [G, n] whether it counts
    before,  # [G] how many did on the first look; not read on that one
    packed,  # [G, n] the same positions, those that count first
    count,  # [G] int64, how many those are
    shift,  # [G] position of the last of them
    again,  # [G] whether the states of this group must be summed once more
    n,
    FIRST: tl.constexpr,
    BT: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    last = tl.full([BT], 0, tl.int32)
    members = tl.full([BT], 0, tl.int32)
    for start in range(0, n, BT):
        i = start + tl.arange(0, BT)
        used = tl.load(member + g * n + i, mask=i < n, other=0) != 0
        last = tl.maximum(last, tl.where(used, i, 0))
        members += used.to(tl.int32)
    number = tl.sum(members)
    if FIRST:
        tl.store(again + g, 0)
    elif number != tl.load(before + g):
        tl.store(again + g, 1)
    tl.store(count + g, number.to(tl.int64))
    tl.store(shift + g, tl.load(token + g * n + tl.max(last)))
    earlier = 0
    for start in range(0, n, BT):
        i = start + tl.arange(0, BT)
        used = tl.load(member + g * n + i, mask=i < n, other=0) != 0
        rank = earlier + tl.cumsum(used.to(tl.int32), 0)  # members up to here, this one included
        place = tl.where(used, rank - 1, number + i - rank)
        tl.store(packed + g * n + place, tl.load(token + g * n + i, mask=i < n, other=0), mask=i < n)
        earlier += tl.sum(used.to(tl.int32))


@triton.jit(do_not_specialize=["stride_s", "stride_b", "stride_t", "T", "G", "n", "blocks"])
def _scan_kernel(
    x,  # [S, B, T, D] by strides
    token,  # [G, n] packed
    count,  # [G]
    shift,  # [G] the token whose state is subtracted before summing
    again,  # [G]; not read on the first look
    scale,  # [S, G]; not read on the first look
    sums,  # [S, G, blocks, D] Σ (x − shift) over the tokens of a block; scaled on the second look
    top,  # [S, G, n] max |x| of a token, inf if it is not finite; written on the first look
    stride_s,
    stride_b,
    stride_t,
    T,
    G,
    n,
    blocks,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
    FIRST: tl.constexpr,
):
    block, s, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    group = s * G + g
    number = tl.load(count + g).to(tl.int32)
    wanted = block * BT < number
    if not FIRST:
        wanted = wanted & (tl.load(again + g) != 0)
    if wanted:
        i = block * BT + tl.arange(0, BT)
        keep = i < number
        position = tl.load(token + g.to(tl.int64) * n + i, mask=keep, other=0)
        rows = s * stride_s + (position // T) * stride_b + (position % T) * stride_t
        origin = tl.load(shift + g)
        start = s * stride_s + (origin // T) * stride_b + (origin % T) * stride_t
        if ALIGN > 1:
            rows = tl.multiple_of(rows, ALIGN)
            start = tl.multiple_of(start, ALIGN)
        k = 1.0
        if not FIRST:
            k = tl.load(scale + group)
        largest = tl.full([BT, BD], 0, tl.int32)  # magnitudes as bits: in their order, and NaN above infinity
        for d0 in tl.range(0, D, BD, num_stages=STAGES):
            d = d0 + tl.arange(0, BD)
            inside = d < D
            value = tl.load(x + rows[:, None] + d[None, :], mask=keep[:, None] & inside[None, :], other=0.0)
            value = value.to(tl.float32)
            zero = tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)
            if FIRST:
                largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            else:
                value, zero = value * k, zero * k
            deviation = tl.where(keep[:, None], value - zero[None, :], 0.0)
            tl.store(sums + (group * blocks + block) * D + d, tl.sum(deviation, 0), mask=inside)
        if FIRST:
            bits = tl.minimum(tl.max(largest, 1), 0x7F800000)
            tl.store(top + group * n + i, bits.to(tl.float32, bitcast=True), mask=i < n)


@triton.jit(do_not_specialize=["G", "n"])
def _scale_kernel(
    count,  # [G]
    top,  # [S, G, n]
    alive,  # [S, G] whether there is a finite member
    scale,  # [S, G] the power of two that brings the largest finite magnitude to 1, or 2^TARGET
    again,  # [G]
    G,
    n,
    TARGET: tl.constexpr,
    BT: tl.constexpr,
):
    s, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    group = s * G + g
    number = tl.load(count + g).to(tl.int32)
    largest = tl.full([BT], 0.0, tl.float32)
    found = tl.full([BT], 0, tl.int32)
    for start in range(0, n, BT):
        i = start + tl.arange(0, BT)
        size = tl.load(top + group * n + i, mask=i < number, other=float("inf"))
        finite = size < float("inf")
        largest = tl.maximum(largest, tl.where(finite, size, 0.0))
        found += finite.to(tl.int32)
    exponent = (tl.max(largest).to(tl.int32, bitcast=True) >> 23) - 126 - TARGET
    exponent = tl.where(tl.max(largest) > 0, tl.minimum(tl.maximum(exponent, -120), 120), 0)
    tl.store(scale + group, ((127 - exponent) << 23).to(tl.float32, bitcast=True))
    tl.store(alive + group, (tl.sum(found) > 0).to(tl.uint8))
    if exponent > 80:  # sums of unscaled values may have left fp32
        tl.store(again + g, 1)


@triton.jit(do_not_specialize=["S", "G", "n"])
def _keep_kernel(
    count,  # [G]
    top,  # [S, G, n]
    alive,  # [S, G]
    kept,  # [G, n] members that are finite in every state with a finite member
    S,
    G,
    n,
    BT: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BT + tl.arange(0, BT)
    keep = i < tl.load(count + g).to(tl.int32)
    some = tl.full([BT], 0, tl.int32)
    bad = tl.full([BT], 0, tl.int32)
    group = g
    for _ in range(0, S):
        lives = tl.load(alive + group).to(tl.int32)
        size = tl.load(top + group * n + i, mask=keep, other=0.0)
        some += lives
        bad += tl.where(size < float("inf"), 0, lives)
        group += G
    tl.store(kept + g * n + i, (keep & (bad == 0) & (some > 0)).to(tl.uint8), mask=i < n)


@triton.jit(do_not_specialize=["stride_s", "stride_b", "stride_t", "T", "G", "blocks"])
def _mean_kernel(
    x,  # [S, B, T, D] by strides
    shift,  # [G]
    sums,  # [S, G, blocks, D]
    scale,  # [S, G] power of two
    count,  # [G]
    again,  # [G] whether the sums are scaled
    mean,  # [S, G, D] scale · mean
    stride_s,
    stride_b,
    stride_t,
    T,
    G,
    blocks,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    s, g = tl.program_id(1).to(tl.int64), tl.program_id(2)
    group = s * G + g
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = d < D
    origin = tl.load(shift + g)
    start = s * stride_s + (origin // T) * stride_b + (origin % T) * stride_t
    number = tl.load(count + g).to(tl.int32)
    total = tl.full([BD], 0.0, tl.float32)
    for block in range(0, (number + BT - 1) // BT):
        total += tl.load(sums + (group * blocks + block) * D + d, mask=inside, other=0.0)
    k = tl.load(scale + group)
    total *= tl.where(tl.load(again + g) != 0, 1.0, k)
    zero = tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean + group * D + d, zero * k + total / number.to(tl.float32), mask=inside)


@dataclass(frozen=True)
class Centre:
    """What the Gram matrices need to know of the groups."""

    token: Tensor
    """[G, n], those that count first."""
    count: Tensor
    """[G] int64, how many those are."""
    alive: Tensor
    """[S, G] uint8, whether a state has a finite token."""
    scale: Tensor
    """[S, G], a power of two."""
    mean: Tensor
    """[S, G, D], scaled."""


def alignment(states: Tensor) -> int:
    """How many elements every token's offset is a multiple of, up to 16 bytes: the width of a vector load."""
    width = 16 // states.element_size()
    return width if all(stride % width == 0 for stride in states.stride()[:3]) else 1


def centre(states: Tensor, token: Tensor, member: Tensor) -> Centre:
    """Choose the tokens, scales and means of groups of tokens `[G, n]`, of which `member` (uint8) says which are."""
    S, _, T, D = states.shape
    G, n = token.shape
    BT, BD, warps, stages = SCAN
    blocks, width = ceil_div(n, BT), min(256, power_of_2(D))
    where = (*states.stride()[:3], T, G)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=states.device)

    sums, top, mean, scale = empty(S, G, blocks, D), empty(S, G, n), empty(S, G, D), empty(S, G)
    shift, found, count, again = (empty(G, dtype=torch.int64) for _ in range(4))
    alive, kept = empty(S, G, dtype=torch.uint8), empty(G, n, dtype=torch.uint8)

    def choose(old: Tensor, used: Tensor, number: Tensor, first: bool) -> Tensor:
        packed = torch.empty_like(old)
        _pack_kernel[(G,)](old, used, found, packed, number, shift, again, n, FIRST=first, BT=1024, num_warps=4)
        _scan_kernel[(blocks, S, G)](
            states, packed, number, shift, again, scale, sums, top, *where, n, blocks,
            D=D, BT=BT, BD=min(BD, power_of_2(D)), STAGES=stages, ALIGN=alignment(states), FIRST=first,
            num_warps=warps,
        )  # fmt: skip
        return packed

    packed = choose(token, member, found, first=True)
    target = 14 if states.dtype == torch.float16 else 0  # float16 is narrow: near its top
    _scale_kernel[(S, G)](found, top, alive, scale, again, G, n, TARGET=target, BT=1024, num_warps=4)
    _keep_kernel[(ceil_div(n, 128), G)](found, top, alive, kept, S, G, n, BT=128, num_warps=4)
    # Seldom, and known on the device only: where a token drops out, the sums are taken again without it.
    packed = choose(packed, kept, count, first=False)
    _mean_kernel[(ceil_div(D, width), S, G)](
        states, shift, sums, scale, count, again, mean, *where, blocks, D=D, BT=BT, BD=width, num_warps=4
    )
    return Centre(packed, count, alive, scale, mean)


__all__ = ["Centre", "alignment", "centre"]
