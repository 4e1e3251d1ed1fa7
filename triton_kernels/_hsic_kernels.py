"""HSIC of every pair of states in Triton: one look at the states for their means, one for the norms, then Gram tiles.

With x a token, m the mean of its group and c = x − m, the Gram of the centred tokens comes from tokens as they lie in
memory: c_i · c_j = x_i · x_j − c_i · m − c_j · m − ‖m‖². No centred copy is written, which would need as much memory as
the states. Where ‖m‖² is so large that x_i · x_j would lose c_i · c_j in fp32 (a constant of 1e4 on a feature), or
where squares leave fp32, a second kernel takes over: it centres the left operand in registers, rounds it to ĉ, and
subtracts ĉ_i · m, which is known exactly. Which of the two is decided on the device for every state and group. fp32
states and short groups have both operands centred, and products of three TF32 terms.

The unbiased estimator is an inner product of U-centred Grams: HSIC₁ = Σ_{i≠j} K^U_ij L^U_ij/(n(n − 3)) with
K^U_ij = K_ij + a_i/(n − 2) + a_j/(n − 2) − Σa/((n − 1)(n − 2)) and a_i = ‖c_i‖²: row i of K sums to −a_i without its
diagonal. The shifts are added before an entry is rounded, so that nothing cancels afterwards.

Tiles i < j of a panel are written as `[tile, S, BI·BJ]` and contracted over their last axis to `[tile, S, S]` in fp32;
tiles are added up in fp64. Every state of a group is scaled by a power of two that brings its largest magnitude to 1.
"""

# Triton's language is typed for its compiler, not for pyright.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_STATES = 256
"""The contraction holds all pairs of states on chip."""

_PANEL_BYTES = 160 * 2**20
"""Gram tiles of all states that are held at once."""

_SUMS_BYTES = 48 * 2**20
"""Partial sums over blocks of tokens; groups beyond that are worked through in turn."""

_SHORT = 128
"""Groups up to this length go through the fp32 kernels whatever their dtype: few tokens average no rounding away."""


@dataclass(frozen=True)
class Tiling:
    """Launch settings of one shape class."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    parts: int
    """Into how many pieces the contraction cuts a tile."""


LONG = Tiling(rows=128, columns=256, features=64, warps=8, stages=3, parts=8)
LONG_FP32 = Tiling(rows=64, columns=128, features=32, warps=4, stages=3, parts=2)
SHORT_FP32 = Tiling(rows=64, columns=64, features=32, warps=4, stages=2, parts=1)


@triton.jit(do_not_specialize=["stride_s", "stride_b", "stride_t", "T", "G", "n", "blocks"])
def _scan_kernel(
    x,  # [S, B, T, D] by strides
    token,  # [G, n] position in B·T
    member,  # [G, n]
    shift,  # [G] the token whose state is subtracted before summing
    wanted,  # [G] whether to look at this group at all
    sums,  # [S, G, blocks, D] Σ (x − shift) over the tokens of a block
    top,  # [S, G, n] max |x| of a token, inf if it is not finite, 0 if it is no member
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
):
    block, s, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    group = s * G + g
    if tl.load(wanted + g) != 0:
        i = block * BT + tl.arange(0, BT)
        keep = tl.load(member + g.to(tl.int64) * n + i, mask=i < n, other=0) != 0
        position = tl.load(token + g.to(tl.int64) * n + i, mask=keep, other=0)
        rows = s * stride_s + (position // T) * stride_b + (position % T) * stride_t
        origin = tl.load(shift + g)
        start = s * stride_s + (origin // T) * stride_b + (origin % T) * stride_t
        if ALIGN > 1:
            rows = tl.multiple_of(rows, ALIGN)
            start = tl.multiple_of(start, ALIGN)
        largest = tl.zeros([BT, BD], tl.int32)  # magnitudes as bits: in their order, and NaN above infinity
        for d0 in tl.range(0, D, BD, num_stages=STAGES):
            d = d0 + tl.arange(0, BD)
            inside = d < D
            value = tl.load(x + rows[:, None] + d[None, :], mask=keep[:, None] & inside[None, :], other=0.0)
            value = value.to(tl.float32)
            zero = tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            deviation = tl.where(keep[:, None], value - zero[None, :], 0.0)
            tl.store(sums + (group * blocks + block) * D + d, tl.sum(deviation, 0), mask=inside)
        bits = tl.minimum(tl.max(largest, 1), 0x7F800000)
        tl.store(top + group * n + i, bits.to(tl.float32, bitcast=True), mask=i < n)


@triton.jit(do_not_specialize=["n"])
def _count_kernel(
    token,  # [G, n]
    before,  # [G, n] members
    after,  # [G, n] members that are left
    shift,  # [G] position of the last of them
    changed,  # [G] whether some are not
    count,  # [G] int64
    n,
    FIRST: tl.constexpr,
    BT: tl.constexpr,
):
    """The last member, not the first: that one is often a sink, far from all others."""
    g = tl.program_id(0).to(tl.int64)
    last = tl.full([BT], 0, tl.int32)
    members = tl.full([BT], 0, tl.int32)
    gone = tl.full([BT], 0, tl.int32)
    for start in range(0, n, BT):
        i = start + tl.arange(0, BT)
        old = tl.load(before + g * n + i, mask=i < n, other=0) != 0
        new = tl.load(after + g * n + i, mask=i < n, other=0) != 0
        last = tl.maximum(last, tl.where(new, i, 0))
        members += new.to(tl.int32)
        gone += (old != new).to(tl.int32)
    tl.store(shift + g, tl.load(token + g * n + tl.max(last)))
    tl.store(count + g, tl.sum(members).to(tl.int64))
    tl.store(changed + g, 1 if FIRST else tl.sum(gone))


@triton.jit(do_not_specialize=["G", "n"])
def _scale_kernel(
    member,  # [G, n]
    top,  # [S, G, n]
    alive,  # [S, G] whether there is a finite member
    scale,  # [S, G] the power of two that brings the largest finite magnitude to 1, or 2^TARGET
    G,
    n,
    TARGET: tl.constexpr,
    BT: tl.constexpr,
):
    s, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    group = s * G + g
    largest = tl.zeros([BT], tl.float32)
    found = tl.full([BT], 0, tl.int32)
    for start in range(0, n, BT):
        i = start + tl.arange(0, BT)
        keep = tl.load(member + g * n + i, mask=i < n, other=0) != 0
        size = tl.load(top + group * n + i, mask=i < n, other=0.0)
        finite = keep & (size < float("inf"))
        largest = tl.maximum(largest, tl.where(finite, size, 0.0))
        found += finite.to(tl.int32)
    exponent = (tl.max(largest).to(tl.int32, bitcast=True) >> 23) - 126 - TARGET
    exponent = tl.where(tl.max(largest) > 0, tl.minimum(tl.maximum(exponent, -120), 120), 0)
    tl.store(scale + group, ((127 - exponent) << 23).to(tl.float32, bitcast=True))
    tl.store(alive + group, (tl.sum(found) > 0).to(tl.uint8))


@triton.jit(do_not_specialize=["S", "G", "n"])
def _keep_kernel(
    member,  # [G, n]
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
    keep = tl.load(member + g * n + i, mask=i < n, other=0) != 0
    some = tl.full([BT], 0, tl.int32)
    bad = tl.full([BT], 0, tl.int32)
    group = g
    for _ in range(0, S):
        lives = tl.load(alive + group).to(tl.int32)
        size = tl.load(top + group * n + i, mask=i < n, other=0.0)
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
    mean,  # [S, G, D] scale · mean
    stride_s,
    stride_b,
    stride_t,
    T,
    G,
    blocks,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    s, g = tl.program_id(1).to(tl.int64), tl.program_id(2)
    group = s * G + g
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = d < D
    origin = tl.load(shift + g)
    start = s * stride_s + (origin // T) * stride_b + (origin % T) * stride_t
    total = tl.zeros([BD], tl.float32)
    for block in range(0, blocks):
        total += tl.load(sums + (group * blocks + block) * D + d, mask=inside, other=0.0)
    k = tl.load(scale + group)
    zero = tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean + group * D + d, (zero + total / tl.load(count + g).to(tl.float32)) * k, mask=inside)


@triton.jit(do_not_specialize=["stride_s", "stride_b", "stride_t", "T", "G", "n"])
def _norm_kernel(
    x,  # [S, B, T, D] by strides
    token,  # [G, n]
    member,  # [G, n]
    alive,  # [S, G]
    scale,  # [S, G]
    count,  # [G]
    mean,  # [S, G, D] scaled
    square,  # [S, G, n] a = ‖c‖², scaled
    row,  # [2, S, G, n] what to add to a row of the raw and of the one-sided Gram
    column,  # [2, S, G, n] and to its column
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
    keep = tl.load(member + g * n + i, mask=i < n, other=0) != 0
    position = tl.load(token + g * n + i, mask=keep, other=0)
    rows = s * stride_s + (position // T) * stride_b + (position % T) * stride_t
    if ALIGN > 1:
        rows = tl.multiple_of(rows, ALIGN)
    k = tl.load(scale + group)
    a = tl.zeros([BT, BD], tl.float32)
    mm = tl.zeros([BD], tl.float32)
    if not FP32:
        along = tl.zeros([BT, BD], tl.float32)  # c · m
        rounded_a = tl.zeros([BT, BD], tl.float32)  # ĉ · c
        rounded_along = tl.zeros([BT, BD], tl.float32)  # ĉ · m
    for d0 in tl.range(0, D, BD, num_stages=STAGES):
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
    tl.store(length + group, total)
    out, far = group * n + i, tl.num_programs(1).to(tl.int64) * G * n
    lives = tl.load(alive + group) != 0
    tl.store(square + out, tl.where(keep & lives, squared, 0.0), mask=i < n)
    share = 0.0
    if UNBIASED:
        share = 1.0 / (tl.load(count + g) - 2).to(tl.float32)
    added = squared * share
    if FP32:
        tl.store(row + out, added, mask=i < n)
        tl.store(column + out, added, mask=i < n)
    else:
        sideways = tl.sum(along, 1)
        tl.store(row + out, added - sideways - total, mask=i < n)
        tl.store(column + out, added - sideways, mask=i < n)
        tl.store(row + far + out, tl.sum(rounded_a, 1) * share - tl.sum(rounded_along, 1), mask=i < n)
        tl.store(column + far + out, added, mask=i < n)


@triton.jit(do_not_specialize=["G", "n"])
def _moment_kernel(
    square,  # [S, G, n]
    scale,  # [S, G]
    count,  # [G]
    length,  # [S, G]
    total,  # [S, G] Σa, scaled
    offset,  # [S, G] what to add to every entry of the Gram
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
    one = tl.zeros([BT], tl.float64)
    two = tl.zeros([BT], tl.float64)
    most = tl.zeros([BT], tl.float64)
    for start in range(0, n, BT):
        i = start + tl.arange(0, BT)
        a = tl.load(square + group * n + i, mask=i < n, other=0.0).to(tl.float64)
        one += a
        two += a * a
        most = tl.maximum(most, a * a)
    k = tl.load(scale + group)
    grow = 1.0 / k.to(tl.float64)
    grow = grow * grow
    grow = grow * grow
    place = g * tl.num_programs(0) + s
    tl.store(fourth + place, tl.sum(two, 0) * grow)
    tl.store(fourth_max + place, tl.max(most, 0) * grow)
    every = tl.sum(one, 0)
    tl.store(total + group, every)
    examples = tl.load(count + g).to(tl.float64)
    if UNBIASED:
        tl.store(offset + group, (-every / ((examples - 1) * (examples - 2))).to(tl.float32))
    else:
        tl.store(offset + group, 0.0)
    if not FP32:
        far = tl.load(length + group).to(tl.float64) * examples > 16 * every
        tl.store(hard + group, (far | (k > 2.0**50) | (k < 2.0**-50)).to(tl.int32))


@triton.jit
def _gram_tile(
    x, token, member, scale, mean, row, column, offset, gram, stride_s, stride_b, stride_t, T, G, n, S,
    tile, s, g, within,
    D: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of one state; MODE 0: both operands as they are, 1: the left one centred, 2: both centred, in fp32."""
    # Tiles of a group by column: above and on the diagonal, column c has RATIO·(c + 1) of them.
    RATIO: tl.constexpr = BJ // BI
    step = within // RATIO
    c = ((tl.sqrt((8 * step + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    c = tl.where(c * (c + 1) // 2 > step, c - 1, c)
    c = tl.where((c + 1) * (c + 2) // 2 <= step, c + 1, c)
    r = (step - c * (c + 1) // 2) * RATIO + within % RATIO
    i, j = r * BI + tl.arange(0, BI), c * BJ + tl.arange(0, BJ)
    group = s * G + g

    position = tl.load(token + g * n + i, mask=i < n, other=0)
    left = s * stride_s + (position // T) * stride_b + (position % T) * stride_t
    position = tl.load(token + g * n + j, mask=j < n, other=0)
    right = s * stride_s + (position // T) * stride_b + (position % T) * stride_t
    if ALIGN > 1:
        left, right = tl.multiple_of(left, ALIGN), tl.multiple_of(right, ALIGN)
    k = tl.load(scale + group)
    d = tl.arange(0, BD)
    a_pointers = x + left[:, None] + d[None, :]
    b_pointers = x + right[:, None] + d[None, :]
    total = tl.zeros([BI, BJ], tl.float32)
    for d0 in range(0, D, BD):
        if D % BD == 0:
            a = tl.load(a_pointers)
            b = tl.load(b_pointers)
            m = tl.load(mean + group * D + d0 + d)
        else:
            inside = d0 + d < D
            a = tl.load(a_pointers, mask=inside[None, :], other=0.0)
            b = tl.load(b_pointers, mask=inside[None, :], other=0.0)
            m = tl.load(mean + group * D + d0 + d, mask=inside, other=0.0)
        if MODE == 2:
            a = a.to(tl.float32) * k - m[None, :]
            b = b.to(tl.float32) * k - m[None, :]
            total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
        else:
            if MODE == 1:
                a = (a.to(tl.float32) * k - m[None, :]).to(x.dtype.element_ty)
            if INTERPRET:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, tl.trans(b), total)
        a_pointers += BD
        b_pointers += BD
    if MODE == 0:
        total = total * (k * k)
    if MODE == 1:
        total = total * k
        far = tl.num_programs(1).to(tl.int64) * G * n
        row += far
        column += far
    keep_i = tl.load(member + g * n + i, mask=i < n, other=0) != 0
    keep_j = tl.load(member + g * n + j, mask=j < n, other=0) != 0
    add_i = tl.load(row + group * n + i, mask=i < n, other=0.0) + tl.load(offset + group)
    add_j = tl.load(column + group * n + j, mask=j < n, other=0.0)
    total = total + add_i[:, None] + add_j[None, :]
    total = tl.where(keep_i[:, None] & keep_j[None, :] & (i[:, None] < j[None, :]), total, 0.0)
    place = tl.arange(0, BI)[:, None] * BJ + tl.arange(0, BJ)[None, :]
    tl.store(gram + (tile * S + s) * (BI * BJ) + place, total.to(gram.dtype.element_ty))


@triton.jit(do_not_specialize=["stride_s", "stride_b", "stride_t", "T", "G", "n", "S", "first", "per_group", "tiles"])
def _gram_kernel(
    x,  # [S, B, T, D] by strides
    token,  # [G, n]
    member,  # [G, n]
    scale,  # [S, G]
    mean,  # [S, G, D] scaled
    row,  # [S, G, n]
    column,  # [S, G, n]
    offset,  # [S, G]
    hard,  # [S, G]
    gram,  # [tiles of this panel, S, BI·BJ]
    stride_s,
    stride_b,
    stride_t,
    T,
    G,
    n,
    S,
    first,
    per_group,
    tiles,
    D: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    ALIGN: tl.constexpr,
    MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    s = tl.program_id(1).to(tl.int64)
    # The rare kernel has few programs, each with several tiles, so that they are gone at once where nothing is to do.
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile64 = s * 0 + tile
        g = (first + tile64) // per_group
        wanted = True
        if MODE == 0:
            wanted = tl.load(hard + s * G + g) == 0
        if MODE == 1:
            wanted = tl.load(hard + s * G + g) != 0
        if wanted:
            _gram_tile(
                x, token, member, scale, mean, row, column, offset, gram, stride_s, stride_b, stride_t, T, G, n, S,
                tile64, s, g, ((first + tile64) % per_group).to(tl.int32),
                D, BI, BJ, BD, ALIGN, MODE, INTERPRET,
            )  # fmt: skip


@triton.jit(do_not_specialize=["S", "first"])
def _contract_kernel(
    gram,  # [tiles of this panel, S, ENTRIES]
    inner,  # [all tiles, PARTS, S, S]
    S,
    first,
    ENTRIES: tl.constexpr,
    PARTS: tl.constexpr,
    BA: tl.constexpr,  # states 0 … BA − 1
    BB: tl.constexpr,  # and the rest of them, 0 if there are none
    BE: tl.constexpr,
    FP32: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    tile, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    precision: tl.constexpr = "tf32x3" if FP32 else "tf32"
    e = tl.arange(0, BE)
    base = gram + tile * S * ENTRIES + part * (ENTRIES // PARTS)
    sa = tl.arange(0, BA)
    out = inner + ((first + tile) * PARTS + part) * S * S
    a_pointers = base + sa[:, None] * ENTRIES + e[None, :]
    aa = tl.zeros([BA, BA], tl.float32)
    if BB == 0:
        for _ in range(0, ENTRIES // PARTS, BE):
            a = tl.load(a_pointers, mask=sa[:, None] < S, other=0.0)
            if INTERPRET:
                a = a.to(tl.float32)
            aa = tl.dot(a, tl.trans(a), aa, input_precision=precision)
            a_pointers += BE
    else:
        sb = BA + tl.arange(0, BB)
        b_pointers = base + sb[:, None] * ENTRIES + e[None, :]
        ab = tl.zeros([BA, BB], tl.float32)
        bb = tl.zeros([BB, BB], tl.float32)
        for _ in range(0, ENTRIES // PARTS, BE):
            a = tl.load(a_pointers)
            b = tl.load(b_pointers, mask=sb[:, None] < S, other=0.0)
            if INTERPRET:
                a, b = a.to(tl.float32), b.to(tl.float32)
            aa = tl.dot(a, tl.trans(a), aa, input_precision=precision)
            ab = tl.dot(a, tl.trans(b), ab, input_precision=precision)
            bb = tl.dot(b, tl.trans(b), bb, input_precision=precision)
            a_pointers += BE
            b_pointers += BE
        tl.store(out + sa[:, None] * S + sb[None, :], ab, mask=sb[None, :] < S)
        tl.store(out + sb[None, :] * S + sa[:, None], ab, mask=sb[None, :] < S)
        tl.store(out + sb[:, None] * S + sb[None, :], bb, mask=(sb[:, None] < S) & (sb[None, :] < S))
    tl.store(out + sa[:, None] * S + sa[None, :], aa, mask=(sa[:, None] < S) & (sa[None, :] < S))


@triton.jit(do_not_specialize=["S", "G", "pieces", "min_tokens"])
def _finish_kernel(
    inner,  # [G, pieces, S, S] Σ K L over i < j
    extra,  # [G, S, S] fp64 Σ a b; not read if unbiased
    total,  # [S, G] fp64
    length,  # [S, G]
    scale,  # [S, G]
    alive,  # [S, G]
    count,  # [G]
    hsic,  # [G, S, S] fp64
    S,
    G,
    pieces,
    min_tokens,
    ROUNDING: tl.constexpr,
    MEAN_ROUNDING: tl.constexpr,
    UNBIASED: tl.constexpr,
    BP: tl.constexpr,
    BE: tl.constexpr,
):
    g = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    inside = e < S * S
    summed = tl.zeros([BP, BE], tl.float64)
    for start in range(0, pieces, BP):
        p = start + tl.arange(0, BP)
        there = (p[:, None] < pieces) & inside[None, :]
        summed += tl.load(inner + (g * pieces + p[:, None]) * S * S + e[None, :], mask=there, other=0.0).to(tl.float64)
    value = 2 * tl.sum(summed, 0)
    a, b = (e // S) * G + g, (e % S) * G + g
    n = tl.load(count + g)
    examples = n.to(tl.float64)
    if UNBIASED:
        # A self-HSIC within the rounding of its entries is zero: states without structure must not look related.
        squares = tl.load(total + a, mask=inside, other=0.0)
        # n entries of a row; what is left of the mean, whose rounding is 2⁻²² of it, meets that row's token.
        operands = ROUNDING * ROUNDING * squares * squares / examples
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


_SCAN = (32, 64, 1, 3)
_NORM = (8, 128, 2, 3)
"""Tokens, features, warps and stages of the passes over the states."""

_ROUNDING = {True: 2.0**-20, False: 2.0**-7}
"""Rounding of an operand, by whether the kernels are fp32. Of states without structure (one token differs from all
others), n entries of the U-centred Gram are left, each this small relative to Σa/n."""


def _alignment(states: Tensor) -> int:
    """How many elements every token's offset is a multiple of, up to 16 bytes: the width of a vector load."""
    width = 16 // states.element_size()
    return width if all(stride % width == 0 for stride in states.stride()[:3]) else 1


def _split(S: int) -> tuple[int, int]:
    """Powers of two that cover S states: the largest one that fits, and one for the rest."""
    main = max(16, 2 ** (S.bit_length() - 1))
    return main, max(16, triton.next_power_of_2(S - main)) if main < S else 0


def _centre(states: Tensor, token: Tensor, member: Tensor) -> tuple[Tensor, ...]:
    """Members that count `[G, n]` and their number `[G]`, states that have any, their scales `[S, G]`, scaled means."""
    S, _, T, D = states.shape
    G, n = token.shape
    strides = states.stride()[:3]
    BT, BD, warps, stages = _SCAN
    BD = min(BD, triton.next_power_of_2(D))
    blocks = triton.cdiv(n, BT)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=states.device)

    sums, top, mean, scale = empty(S, G, blocks, D), empty(S, G, n), empty(S, G, D), empty(S, G)
    shift, count = empty(G, dtype=torch.int64), empty(G, dtype=torch.int64)
    changed, alive = empty(G, dtype=torch.int32), empty(S, G, dtype=torch.uint8)
    kept = empty(G, n, dtype=torch.uint8)

    def look(old: Tensor, new: Tensor, first: bool) -> None:
        _count_kernel[(G,)](token, old, new, shift, changed, count, n, FIRST=first, BT=1024, num_warps=4)
        _scan_kernel[(blocks, S, G)](
            states, token, new, shift, changed, sums, top, *strides, T, G, n, blocks,
            D=D, BT=BT, BD=BD, STAGES=stages, ALIGN=_alignment(states), num_warps=warps,
        )  # fmt: skip

    look(member, member, True)
    target = 14 if states.dtype == torch.float16 else 0  # float16 is narrow: near its top
    _scale_kernel[(S, G)](member, top, alive, scale, G, n, TARGET=target, BT=1024, num_warps=4)
    _keep_kernel[(triton.cdiv(n, 128), G)](member, top, alive, kept, S, G, n, BT=128, num_warps=4)
    # Seldom, and known on the device only: where a token drops out, the means are taken again without it.
    look(member, kept, False)
    BM = min(256, triton.next_power_of_2(D))
    _mean_kernel[(triton.cdiv(D, BM), S, G)](
        states, shift, sums, scale, count, mean, *strides, T, G, blocks, D=D, BD=BM, num_warps=4
    )
    return kept, count, alive, scale, mean


def _inner(
    states: Tensor, token: Tensor, kept: Tensor, centre: tuple[Tensor, ...], shifts: tuple[Tensor, ...],
    tiling: Tiling, fp32: bool,
) -> Tensor:  # fmt: skip
    """Σ_{i<j} K_ij L_ij of the shifted Grams, per piece of a group: `[G, pieces, S, S]`."""
    S, _, T, D = states.shape
    G, n = token.shape
    interpret = not states.is_cuda
    columns = triton.cdiv(n, tiling.columns)
    per_group = tiling.columns // tiling.rows * columns * (columns + 1) // 2
    tiles, entries = G * per_group, tiling.rows * tiling.columns
    dtype = torch.float32 if fp32 else torch.bfloat16
    panel = min(tiles, max(1, _PANEL_BYTES // (S * entries * dtype.itemsize)))
    panel = triton.cdiv(tiles, triton.cdiv(tiles, panel))
    gram = torch.empty(panel, S, entries, dtype=dtype, device=states.device)
    inner = torch.empty(G, per_group * tiling.parts, S, S, dtype=torch.float32, device=states.device)
    BA, BB = _split(S)
    warps = 2 if BA <= 32 and not fp32 else 4 if BA < 128 else 8
    for first in range(0, tiles, panel):
        here = min(panel, tiles - first)
        for mode, programs in ((2, here),) if fp32 else ((0, here), (1, min(here, _RARE))):
            _gram_kernel[(programs, S)](
                states, token, kept, *centre, *shifts, gram, *states.stride()[:3], T, G, n, S, first, per_group, here,
                D=D, BI=tiling.rows, BJ=tiling.columns, BD=tiling.features, ALIGN=_alignment(states), MODE=mode,
                INTERPRET=interpret, num_warps=tiling.warps, num_stages=tiling.stages,
            )  # fmt: skip
        _contract_kernel[(here, tiling.parts)](
            gram, inner, S, first, ENTRIES=entries, PARTS=tiling.parts, BA=BA, BB=BB, BE=64 if fp32 or BA > 64 else 128,
            FP32=fp32, INTERPRET=interpret, num_warps=warps, num_stages=3 if BA < 128 else 2,
        )  # fmt: skip
    return inner


_RARE = 8
"""Programs per state of the one-sided kernel."""


def _of_groups(
    states: Tensor, token: Tensor, member: Tensor, estimator: str, min_tokens: int, short: bool
) -> tuple[Tensor, ...]:
    S, _, T, D = states.shape
    G, n = token.shape
    unbiased = estimator == "unbiased"
    fp32 = short or states.dtype == torch.float32
    tiling = (SHORT_FP32 if short else LONG_FP32) if fp32 else LONG
    kept, count, alive, scale, mean = _centre(states, token, member)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=states.device)

    square, row, column = empty(S, G, n), empty(2, S, G, n), empty(2, S, G, n)
    length, offset, hard = empty(S, G), empty(S, G), empty(S, G, dtype=torch.int32)
    total, fourth, fourth_max = (empty(*shape, dtype=torch.float64) for shape in ((S, G), (G, S), (G, S)))
    hsic = empty(G, S, S, dtype=torch.float64)
    BT, BD, warps, stages = _NORM
    _norm_kernel[(triton.cdiv(n, BT), S, G)](
        states, token, kept, alive, scale, count, mean, square, row, column, length, *states.stride()[:3], T, G, n,
        D=D, BT=BT, BD=min(BD, triton.next_power_of_2(D)), STAGES=stages, ALIGN=_alignment(states),
        UNBIASED=unbiased, FP32=fp32, num_warps=warps,
    )  # fmt: skip
    _moment_kernel[(S, G)](
        square, scale, count, length, total, offset, hard, fourth, fourth_max, G, n,
        UNBIASED=unbiased, FP32=fp32, BT=1024, num_warps=4,
    )  # fmt: skip
    inner = _inner(states, token, kept, (scale, mean), (row, column, offset, hard), tiling, fp32)
    if unbiased:
        extra = hsic
    else:
        wide = square.transpose(0, 1).double()
        extra = wide @ wide.mT
    _finish_kernel[(triton.cdiv(S * S, 32), G)](
        inner, extra, total, length, scale, alive, count, hsic, S, G, inner.shape[1], min_tokens,
        ROUNDING=_ROUNDING[fp32], MEAN_ROUNDING=2.0**-22, UNBIASED=unbiased, BP=32, BE=32, num_warps=4,
    )  # fmt: skip
    return hsic, count, fourth, fourth_max


@torch.no_grad()
def hsic_statistics(
    states: Tensor, token: Tensor, member: Tensor, estimator: str, min_tokens: int, short: bool | None = None
) -> tuple[Tensor, ...]:
    """Fields of `HsicStatistics`, from the tokens `[G, n]` of every group and which entries of it are tokens.

    `short` overrides the choice of kernels that the length of the groups makes; tests use it.
    """
    S, _, _, D = states.shape
    G, n = token.shape
    member = member.contiguous().view(torch.uint8)
    if short is None:
        short = n <= _SHORT
    step = max(1, _SUMS_BYTES // (4 * S * triton.cdiv(n, _SCAN[0]) * D))
    parts = [
        _of_groups(states, token[g : g + step].contiguous(), member[g : g + step], estimator, min_tokens, short)
        for g in range(0, G, step)
    ]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))
