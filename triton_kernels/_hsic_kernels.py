"""HSIC of every pair of states in Triton: one look at the states for their means, one for the norms, then Gram tiles.

With unit scale, x a token and m the mean of its group, the Gram of the centred tokens c = x − m is taken one-sided,
c_i · x_j = c_i · c_j + c_i · m: the left operand is centred in registers, the right one goes to the tensor cores as it
lies in memory, and c_i · m is subtracted in the epilogue. No centred copy of the states is written. What the rounding ĉ
of the left operand does to c_i · m is known exactly, since c_i · m is computed from ĉ as well.

The unbiased estimator is an inner product of U-centred Grams, K^U_ij = K_ij + a_i/(n − 2) + a_j/(n − 2) − Σa/((n − 1)(n − 2))
for i ≠ j with a_i = ‖c_i‖² (Song et al. 2012; row i of K sums to −a_i without its diagonal): HSIC₁ = Σ_{i≠j} K^U_ij L^U_ij
/(n(n − 3)). The shifts are added before an entry is rounded, so that nothing cancels afterwards.

Tiles i < j of a panel are written as `[tile, S, BI·BJ]` and contracted over their last axis to `[tile, S, S]` in fp32;
tiles are added up in fp64. Every state of a group is scaled by a power of two that brings its largest magnitude to 1.
"""

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

_SHORT = 256
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


LONG = Tiling(rows=128, columns=256, features=64, warps=8, stages=3, parts=4)
LONG_FP32 = Tiling(rows=128, columns=128, features=32, warps=8, stages=2, parts=2)
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
        largest = tl.zeros([BT], tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            inside = d < D
            value = tl.load(x + rows[:, None] + d[None, :], mask=keep[:, None] & inside[None, :], other=0.0)
            value = value.to(tl.float32)
            zero = tl.load(x + start + d, mask=inside, other=0.0).to(tl.float32)
            size = tl.abs(value)
            largest = tl.maximum(largest, tl.max(tl.where(size < float("inf"), size, float("inf")), 1))
            deviation = tl.where(keep[:, None], value - zero[None, :], 0.0)
            tl.store(sums + (group * blocks + block) * D + d, tl.sum(deviation, 0), mask=inside)
        tl.store(top + group * n + i, largest, mask=i < n)


@triton.jit(do_not_specialize=["stride_s", "stride_b", "stride_t", "T", "G", "blocks"])
def _mean_kernel(
    x,  # [S, B, T, D] by strides
    shift,  # [G]
    sums,  # [S, G, blocks, D]
    scale,  # [S, G] power of two
    count,  # [G] fp32
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
    tl.store(mean + group * D + d, (zero + total / tl.load(count + g)) * k, mask=inside)


@triton.jit(do_not_specialize=["stride_s", "stride_b", "stride_t", "T", "G", "n"])
def _norm_kernel(
    x,  # [S, B, T, D] by strides
    token,  # [G, n]
    member,  # [G, n]
    scale,  # [S, G]
    count,  # [G] fp32
    mean,  # [S, G, D] scaled
    square,  # [S, G, n] a = ‖c‖², scaled
    row,  # [S, G, n] what to add to the Gram's row
    column,  # [S, G, n] and to its column
    stride_s,
    stride_b,
    stride_t,
    T,
    G,
    n,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    ALIGN: tl.constexpr,
    UNBIASED: tl.constexpr,
    ROUND: tl.constexpr,
):
    block, s, g = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    group = s * G + g
    i = block * BT + tl.arange(0, BT)
    keep = tl.load(member + g.to(tl.int64) * n + i, mask=i < n, other=0) != 0
    position = tl.load(token + g.to(tl.int64) * n + i, mask=keep, other=0)
    rows = s * stride_s + (position // T) * stride_b + (position % T) * stride_t
    if ALIGN > 1:
        rows = tl.multiple_of(rows, ALIGN)
    k = tl.load(scale + group)
    a = tl.zeros([BT], tl.float32)
    rounded_a = tl.zeros([BT], tl.float32)
    along_mean = tl.zeros([BT], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        inside = d < D
        raw = tl.load(x + rows[:, None] + d[None, :], mask=keep[:, None] & inside[None, :], other=0.0)
        m = tl.load(mean + group * D + d, mask=inside, other=0.0)
        c = raw.to(tl.float32) * k - m[None, :]
        c = tl.where(inside[None, :], c, 0.0)
        a += tl.sum(c * c, 1)
        if ROUND:
            rounded = c.to(x.dtype.element_ty).to(tl.float32)
            rounded_a += tl.sum(rounded * c, 1)
            along_mean += tl.sum(rounded * m[None, :], 1)
    if not ROUND:
        rounded_a = a
    if UNBIASED:
        others = tl.load(count + g) - 2
        rounded_a = rounded_a / others
        added = a / others
    else:
        rounded_a = a * 0
        added = a * 0
    out = group * n + i
    tl.store(square + out, tl.where(keep, a, 0.0), mask=i < n)
    tl.store(row + out, rounded_a - along_mean, mask=i < n)
    tl.store(column + out, added, mask=i < n)


@triton.jit(do_not_specialize=["stride_s", "stride_b", "stride_t", "T", "G", "n", "S", "first", "per_group"])
def _gram_kernel(
    x,  # [S, B, T, D] by strides
    token,  # [G, n]
    member,  # [G, n]
    scale,  # [S, G]
    mean,  # [S, G, D] scaled
    row,  # [S, G, n]
    column,  # [S, G, n]
    offset,  # [S, G]
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
    D: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    ALIGN: tl.constexpr,
    FP32: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    tile, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    g = (first + tile) // per_group
    # Tiles of a group by column: above and on the diagonal, column J has R·(J + 1) of them.
    R: tl.constexpr = BJ // BI
    within = ((first + tile) % per_group).to(tl.int32)
    step = within // R
    J = ((tl.sqrt((8 * step + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    J = tl.where(J * (J + 1) // 2 > step, J - 1, J)
    J = tl.where((J + 1) * (J + 2) // 2 <= step, J + 1, J)
    I = (step - J * (J + 1) // 2) * R + within % R
    i, j = I * BI + tl.arange(0, BI), J * BJ + tl.arange(0, BJ)
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
        a = a.to(tl.float32) * k - m[None, :]
        if FP32:
            b = b.to(tl.float32) * k - m[None, :]
            total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
        else:
            a = a.to(x.dtype.element_ty)
            if INTERPRET:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, tl.trans(b), total)
        a_pointers += BD
        b_pointers += BD
    if not FP32:
        total = total * k
    keep_i = tl.load(member + g * n + i, mask=i < n, other=0) != 0
    keep_j = tl.load(member + g * n + j, mask=j < n, other=0) != 0
    add_i = tl.load(row + group * n + i, mask=i < n, other=0.0) + tl.load(offset + group)
    add_j = tl.load(column + group * n + j, mask=j < n, other=0.0)
    total = total + add_i[:, None] + add_j[None, :]
    total = tl.where(keep_i[:, None] & keep_j[None, :] & (i[:, None] < j[None, :]), total, 0.0)
    place = tl.arange(0, BI)[:, None] * BJ + tl.arange(0, BJ)[None, :]
    tl.store(gram + (tile * S + s) * (BI * BJ) + place, total.to(gram.dtype.element_ty))


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


def _scan(states: Tensor, token: Tensor, member: Tensor, shift: Tensor, wanted: Tensor, sums: Tensor, top: Tensor):
    S, _, T, D = states.shape
    _, G, blocks, _ = sums.shape
    _scan_kernel[(blocks, S, G)](
        states, token, member, shift, wanted, sums, top, *states.stride()[:3], T, G, token.shape[1], blocks,
        D=D, BT=_SCAN_TOKENS, BD=min(256, triton.next_power_of_2(D)), ALIGN=_alignment(states), num_warps=4,
    )  # fmt: skip


_SCAN_TOKENS = 32


def _alignment(states: Tensor) -> int:
    """How many elements every token's offset is a multiple of, up to 16 bytes: the width of a vector load."""
    width = 16 // states.element_size()
    return width if all(stride % width == 0 for stride in states.stride()[:3]) else 1


def _last(member: Tensor) -> Tensor:
    """Index of the last member of each group `[G]`. Not the first: that one is often a sink, far from all others."""
    n = member.shape[1]
    return n - 1 - member.flip(1).to(torch.uint8).argmax(1)


def _centre(states: Tensor, token: Tensor, member: Tensor) -> tuple[Tensor, ...]:
    """Members that count `[G, n]`, which states have any `[S, G]`, their scales `[S, G]`, scaled means `[S, G, D]`."""
    S, _, T, D = states.shape
    G, n = token.shape
    blocks = triton.cdiv(n, _SCAN_TOKENS)
    sums = torch.empty(S, G, blocks, D, dtype=torch.float32, device=states.device)
    top = torch.empty(S, G, n, dtype=torch.float32, device=states.device)
    every = torch.arange(G, device=states.device)

    shift = token[every, _last(member)]
    _scan(states, token, member, shift, torch.ones(G, dtype=torch.int32, device=states.device), sums, top)
    finite = member & top.isfinite()
    alive = finite.any(-1)
    kept = member & (finite | ~alive.unsqueeze(-1)).all(0) & alive.any(0).unsqueeze(-1)
    # Seldom, and known on the device only: where a token drops out, the means are taken again without it.
    shift = token[every, _last(kept)]
    _scan(states, token, kept, shift, (kept != member).any(1).to(torch.int32), sums, top)

    largest = top.masked_fill(~(kept & top.isfinite()), 0.0).amax(-1)
    # float16 has a narrow range: there the largest magnitude goes near its top.
    exponent = torch.frexp(largest).exponent - (14 if states.dtype == torch.float16 else 0)
    scale = (127 - exponent.clamp(-120, 120) << 23).view(torch.float32)
    count = kept.sum(-1, dtype=torch.float32)
    mean = torch.empty(S, G, D, dtype=torch.float32, device=states.device)
    BD = min(256, triton.next_power_of_2(D))
    _mean_kernel[(triton.cdiv(D, BD), S, G)](
        states, shift, sums, scale, count, mean, *states.stride()[:3], T, G, blocks, D=D, BD=BD, num_warps=4
    )
    return kept, alive, scale, mean


def _split(S: int) -> tuple[int, int]:
    """Powers of two that cover S states: the largest one that fits, and one for the rest."""
    main = max(16, 2 ** (S.bit_length() - 1))
    return main, max(16, triton.next_power_of_2(S - main)) if S > main else 0


def _inner(
    states: Tensor, token: Tensor, member: Tensor, centre: tuple[Tensor, ...], shifts: tuple[Tensor, ...],
    tiling: Tiling, fp32: bool,
) -> Tensor:  # fmt: skip
    """Σ_{i<j} K_ij L_ij of the shifted Grams `[G, S, S]` in float64."""
    S, _, T, D = states.shape
    G, n = token.shape
    interpret = not states.is_cuda
    per_row = tiling.columns // tiling.rows
    columns = triton.cdiv(n, tiling.columns)
    per_group = per_row * columns * (columns + 1) // 2
    tiles, entries = G * per_group, tiling.rows * tiling.columns
    dtype = torch.float32 if fp32 else torch.bfloat16
    panel = min(tiles, max(1, _PANEL_BYTES // (S * entries * dtype.itemsize)))
    panel = triton.cdiv(tiles, triton.cdiv(tiles, panel))
    gram = torch.empty(panel, S, entries, dtype=dtype, device=states.device)
    inner = torch.empty(G, per_group * tiling.parts, S, S, dtype=torch.float32, device=states.device)
    BA, BB = _split(S)
    for first in range(0, tiles, panel):
        here = min(panel, tiles - first)
        _gram_kernel[(here, S)](
            states, token, member, *centre, *shifts, gram, *states.stride()[:3], T, G, n, S, first, per_group,
            D=D, BI=tiling.rows, BJ=tiling.columns, BD=tiling.features, ALIGN=_alignment(states), FP32=fp32,
            INTERPRET=interpret, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        _contract_kernel[(here, tiling.parts)](
            gram, inner, S, first, ENTRIES=entries, PARTS=tiling.parts, BA=BA, BB=BB, BE=64 if fp32 else 128,
            FP32=fp32, INTERPRET=interpret, num_warps=8 if BA >= 64 else 4, num_stages=3 if BA < 128 else 2,
        )  # fmt: skip
    return inner.sum(1, dtype=torch.float64)


def _of_groups(states: Tensor, token: Tensor, member: Tensor, estimator: str, short: bool) -> tuple[Tensor, ...]:
    S, _, T, D = states.shape
    G, n = token.shape
    unbiased = estimator == "unbiased"
    fp32 = short or states.dtype == torch.float32
    tiling = (SHORT_FP32 if short else LONG_FP32) if fp32 else LONG
    kept, alive, scale, mean = _centre(states, token, member)
    count = kept.sum(-1)
    square, row, column = (torch.empty(S, G, n, dtype=torch.float32, device=states.device) for _ in range(3))
    BT = 16
    _norm_kernel[(triton.cdiv(n, BT), S, G)](
        states, token, kept, scale, count.float(), mean, square, row, column, *states.stride()[:3], T, G, n,
        D=D, BT=BT, BD=min(512, triton.next_power_of_2(D)), ALIGN=_alignment(states), UNBIASED=unbiased,
        ROUND=not fp32, num_warps=4,
    )  # fmt: skip
    square = square.masked_fill(~alive.unsqueeze(-1), 0.0)
    examples = count.double()
    total = square.sum(-1, dtype=torch.float64)
    offset = -total / ((examples - 1) * (examples - 2)) if unbiased else torch.zeros_like(total)
    inner = 2 * _inner(states, token, kept, (scale, mean), (row, column, offset.float()), tiling, fp32)

    square = square.double().transpose(0, 1)
    total, examples = total.T, examples.view(-1, 1, 1)
    if unbiased:
        # A self-HSIC within the rounding of its entries is zero: states without structure must not look related.
        floor = (_ROUNDING[fp32] * total.unsqueeze(-1)).square()
        same = torch.eye(S, dtype=torch.bool, device=states.device)
        hsic = inner.masked_fill(same & (inner <= floor), 0.0) / (examples * (examples - 3))
    else:
        hsic = (inner + square @ square.mT) / (examples - 1).square()
    grow = scale.double().T.square().reciprocal()
    hsic = hsic * grow.unsqueeze(1) * grow.unsqueeze(2)
    fourth = square.square()
    return hsic, count, fourth.sum(-1) * grow.square(), fourth.amax(-1) * grow.square(), alive.T


_ROUNDING = {True: 2.0**-20, False: 2.0**-11}
"""Rounding of an entry of the U-centred Gram, relative to the sum of squared norms, by whether it is fp32."""


@torch.no_grad()
def hsic_statistics(
    states: Tensor, token: Tensor, member: Tensor, estimator: str, min_tokens: int, short: bool | None = None
) -> tuple[Tensor, ...]:
    """Fields of `HsicStatistics`, from the tokens `[G, n]` of every group and which entries of it are tokens.

    `short` overrides the choice of kernels that the length of the groups makes; tests use it.
    """
    S, _, _, D = states.shape
    G, n = token.shape
    if short is None:
        short = n <= _SHORT
    size = 4 * S * triton.cdiv(n, _SCAN_TOKENS) * D
    step = max(1, _SUMS_BYTES // size)
    parts = [
        _of_groups(states, token[g : g + step], member[g : g + step].contiguous(), estimator, short)
        for g in range(0, G, step)
    ]
    hsic, count, fourth, fourth_max, alive = (torch.cat(part) for part in zip(*parts, strict=True))
    nothing = (count < min_tokens).view(-1, 1, 1) | ~alive.unsqueeze(1) | ~alive.unsqueeze(2)
    return hsic.masked_fill(nothing, torch.nan), count, fourth, fourth_max
