"""Inner products of the Gram matrices of all pairs of states, tile by tile, in Triton.

With x a token, m the mean of its group and c = x − m, the Gram of the centred tokens comes from tokens as they lie in
memory: c_i · c_j = x_i · x_j − c_i · m − c_j · m − ‖m‖². No centred copy is written, which would need as much memory as
the states. Where ‖m‖² is so large that x_i · x_j would lose c_i · c_j in fp32 (a constant of 1e4 on a feature), or
where squares leave fp32, a second kernel takes over: it centres the left operand in registers, rounds it to ĉ, and
subtracts ĉ_i · m, which is known exactly. Which of the two is decided on the device for every state and group. fp32
states and few tokens, over which no rounding averages out, have both operands centred, and products of three TF32
terms.

Tiles i < j are written as `[tile, S, BI·BJ]`, those of a few at a time, and contracted over their last axis to
`[tile, S, S]` in fp32. They are ordered by column, so that those of a group with fewer tokens than the longest are the
first ones; the others are neither computed nor read.
"""

# Triton's language is typed for its compiler, not for pyright.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportCallIssue=false, reportArgumentType=false

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from repflow.triton_kernels._hsic_centre import Centre, alignment
from repflow.triton_kernels._sizes import ceil_div, power_of_2

PANEL_BYTES = 160 * 2**20
"""Gram tiles of all states that are held at once."""

FEW = 128
"""Up to this many tokens, a group goes through the fp32 kernels whatever its dtype."""

RARE = 8
"""Programs per state of the one-sided kernel."""

RAW, ONE_SIDED, CENTRED = (tl.constexpr(mode) for mode in range(3))
"""Operands as they are; the left one centred; both centred, in fp32."""


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
    fp32: bool = True
    """Whether both operands are centred, and tiles are kept in fp32 rather than fp16."""

    def tiles(self, n: int) -> int:
        """Of a group of n tokens: column c holds (c + 1)·columns/rows of them."""
        columns = ceil_div(n, self.columns)
        return self.columns // self.rows * columns * (columns + 1) // 2


LONG = Tiling(rows=128, columns=256, features=64, warps=8, stages=3, parts=8, fp32=False)
LONG_FP32 = Tiling(rows=64, columns=128, features=32, warps=4, stages=3, parts=2)
NARROW = Tiling(rows=64, columns=128, features=64, warps=4, stages=2, parts=2, fp32=False)
NARROW_FP32 = replace(LONG_FP32, stages=2)
"""The same two where a program has less than 160 KiB of shared memory, as on consumers' cards."""

SHORT_FP32 = Tiling(rows=64, columns=64, features=32, warps=4, stages=2, parts=1)


@dataclass(frozen=True)
class Pass:
    """Groups of more than `low` and up to `high` tokens, and where their pieces lie among those of all passes."""

    tiling: Tiling
    low: int
    high: int
    first_piece: int

    @property
    def tiles(self) -> int:
        """Of the longest group."""
        return self.tiling.tiles(self.high)

    @property
    def end(self) -> int:
        """The first piece of the next pass."""
        return self.first_piece + self.tiles * self.tiling.parts


@functools.cache
def _roomy(device: torch.device) -> bool:
    """Whether a program has the shared memory that the settings for long groups were chosen for."""
    if device.type != "cuda":
        return True
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"] >= 160 * 2**10


def plan(n: int, states: Tensor) -> tuple[Pass, Pass]:
    """The passes over groups of up to n tokens: those with many of them, and those with few. One may have no tiles."""
    roomy = _roomy(states.device)
    if n <= FEW:
        return Pass(LONG_FP32, 0, 0, 0), Pass(SHORT_FP32, 0, n, 0)
    if states.dtype == torch.float32:
        long = Pass(LONG_FP32 if roomy else NARROW_FP32, 0, n, 0)
        return long, Pass(SHORT_FP32, 0, 0, long.end)
    long = Pass(LONG if roomy else NARROW, FEW, n, 0)
    return long, Pass(SHORT_FP32, 0, FEW, long.end)


@triton.jit
def tiles_of(number, BI: tl.constexpr, BJ: tl.constexpr):
    """`Tiling.tiles` on the device."""
    columns = (number + BJ - 1) // BJ
    return BJ // BI * (columns * (columns + 1) // 2)


@triton.jit
def _gram_tile(
    x, token, number, scale, mean, edge, offset, shrink, gram, stride_s, stride_b, stride_t, T, G, n, S,
    tile, s, g, within,
    D: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, MODE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of one state."""
    RATIO: tl.constexpr = BJ // BI
    step = within // RATIO
    c = ((tl.sqrt((8 * step + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    c = tl.where(c * (c + 1) // 2 > step, c - 1, c)
    c = tl.where((c + 1) * (c + 2) // 2 <= step, c + 1, c)
    r = (step - c * (c + 1) // 2) * RATIO + within % RATIO
    i, j = r * BI + tl.arange(0, BI), c * BJ + tl.arange(0, BJ)
    group = s * G + g

    position = tl.load(token + g * n + i, mask=i < number, other=0)
    left = s * stride_s + (position // T) * stride_b + (position % T) * stride_t
    position = tl.load(token + g * n + j, mask=j < number, other=0)
    right = s * stride_s + (position // T) * stride_b + (position % T) * stride_t
    if ALIGN > 1:
        left, right = tl.multiple_of(left, ALIGN), tl.multiple_of(right, ALIGN)
    k = tl.load(scale + group)
    lift = 1.0
    if MODE == ONE_SIDED:  # the right operand is not scaled: the left one keeps products of huge and tiny ones in fp32
        lift = tl.where(k < 2.0**-50, 2.0**-60, tl.where(k > 2.0**50, 2.0**60, 1.0))
    d = tl.arange(0, BD)
    a_pointers = x + left[:, None] + d[None, :]
    b_pointers = x + right[:, None] + d[None, :]
    total = tl.full([BI, BJ], 0.0, tl.float32)
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
        if MODE == CENTRED:
            a = a.to(tl.float32) * k - m[None, :]
            b = b.to(tl.float32) * k - m[None, :]
            total = tl.dot(a, tl.trans(b), total, input_precision="tf32x3")
        else:
            if MODE == ONE_SIDED:
                a = ((a.to(tl.float32) * k - m[None, :]) * lift).to(x.dtype.element_ty)
            if INTERPRET:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, tl.trans(b), total)
        a_pointers += BD
        b_pointers += BD
    plane = tl.num_programs(1).to(tl.int64) * G * n
    row, column = edge + group * n, edge + group * n
    if MODE == RAW:
        total = total * (k * k)
        row += plane
        column += 2 * plane
    if MODE == ONE_SIDED:
        total = total * (k / lift)
        row += 3 * plane
    add_i = tl.load(row + i, mask=i < number, other=0.0) + tl.load(offset + group)
    add_j = tl.load(column + j, mask=j < number, other=0.0)
    total = total + add_i[:, None] + add_j[None, :]
    if MODE != CENTRED:
        total = total * tl.load(shrink + group)
    total = tl.where((i[:, None] < j[None, :]) & (j[None, :] < number), total, 0.0)
    place = tl.arange(0, BI)[:, None] * BJ + tl.arange(0, BJ)[None, :]
    tl.store(gram + (tile * S + s) * (BI * BJ) + place, total.to(gram.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "stride_s", "stride_b", "stride_t", "T", "G", "n", "S", "first", "per_group", "tiles", "low", "high",
    ]
)  # fmt: skip
def _gram_kernel(
    x,  # [S, B, T, D] by strides
    token,  # [G, n]
    count,  # [G]
    scale,  # [S, G]
    mean,  # [S, G, D] scaled
    edge,  # [4, S, G, n] what to add to the rows and columns of a tile; the later ones where MODE is not CENTRED
    offset,  # [S, G] and to all of it
    shrink,  # [S, G] the power of two that brings a tile to the top of fp16
    hard,  # [S, G] whether RAW would not do
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
    low,
    high,
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
        within = ((first + tile64) % per_group).to(tl.int32)
        number = tl.load(count + g).to(tl.int32)
        wanted = (number > low) & (number <= high) & (within < tiles_of(number, BI, BJ))
        if MODE == RAW:
            wanted = wanted & (tl.load(hard + s * G + g) == 0)
        if MODE == ONE_SIDED:
            wanted = wanted & (tl.load(hard + s * G + g) != 0)
        if wanted:
            _gram_tile(
                x, token, number, scale, mean, edge, offset, shrink, gram, stride_s, stride_b, stride_t, T, G, n, S,
                tile64, s, g, within,
                D, BI, BJ, BD, ALIGN, MODE, INTERPRET,
            )  # fmt: skip


@triton.jit(do_not_specialize=["S", "first", "per_group", "low", "high", "pieces", "first_piece"])
def _contract_kernel(
    gram,  # [tiles of this panel, S, ENTRIES]
    count,  # [G]
    inner,  # [G, pieces, S, S], of which this pass has tile · PARTS + part, from its first piece on
    S,
    first,
    per_group,
    low,
    high,
    pieces,
    first_piece,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    PARTS: tl.constexpr,
    BA: tl.constexpr,  # states 0 … BA − 1
    BB: tl.constexpr,  # and the rest of them, 0 if there are none
    BE: tl.constexpr,
    FP32: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    ENTRIES: tl.constexpr = BI * BJ
    precision: tl.constexpr = "tf32x3" if FP32 else "tf32"
    tile, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g = (first + tile) // per_group
    within = (first + tile) % per_group
    number = tl.load(count + g).to(tl.int32)
    if (number > low) & (number <= high) & (within < tiles_of(number, BI, BJ)):
        e = tl.arange(0, BE)
        base = gram + tile * S * ENTRIES + part * (ENTRIES // PARTS)
        sa = tl.arange(0, BA)
        out = inner + (g * pieces + first_piece + within * PARTS + part) * S * S
        a_pointers = base + sa[:, None] * ENTRIES + e[None, :]
        aa = tl.full([BA, BA], 0.0, tl.float32)
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
            ab = tl.full([BA, BB], 0.0, tl.float32)
            bb = tl.full([BB, BB], 0.0, tl.float32)
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


def _split(S: int) -> tuple[int, int]:
    """Powers of two that cover S states: one that fits, and one for the rest."""
    main = min(128, max(16, 2 ** (S.bit_length() - 1)))
    return main, max(16, power_of_2(S - main)) if main < S else 0


def add_inner_products(
    inner: Tensor, states: Tensor, centre: Centre, edge: Tensor, offset: Tensor, shrink: Tensor, hard: Tensor,
    piece: Pass,
) -> None:  # fmt: skip
    """Write Σ_{i<j} K_ij L_ij of the shifted Grams of one pass into its pieces of `inner [G, pieces, S, S]`."""
    S, _, T, D = states.shape
    G, n = centre.token.shape
    tiling = piece.tiling
    interpret = not states.is_cuda
    tiles, entries = G * piece.tiles, tiling.rows * tiling.columns
    dtype = torch.float32 if tiling.fp32 else torch.float16
    panel = min(tiles, max(1, PANEL_BYTES // (S * entries * dtype.itemsize)))
    panel = ceil_div(tiles, ceil_div(tiles, panel))
    gram = torch.empty(panel, S, entries, dtype=dtype, device=states.device)
    BA, BB = _split(S)
    depth = (64 if tiling.fp32 or BA > 64 else 128) // (1 if _roomy(states.device) else 2)
    warps = 2 if BA <= 32 and not tiling.fp32 else 4 if BA < 128 else 8
    for first in range(0, tiles, panel):
        here = min(panel, tiles - first)
        modes = ((CENTRED, here),) if tiling.fp32 else ((RAW, here), (ONE_SIDED, min(here, RARE)))
        for mode, programs in modes:
            _gram_kernel[(programs, S)](
                states, centre.token, centre.count, centre.scale, centre.mean, edge, offset, shrink, hard, gram,
                *states.stride()[:3], T, G, n, S, first, piece.tiles, here, piece.low, piece.high,
                D=D, BI=tiling.rows, BJ=tiling.columns, BD=tiling.features, ALIGN=alignment(states), MODE=mode.value,
                INTERPRET=interpret, num_warps=tiling.warps, num_stages=tiling.stages,
            )  # fmt: skip
        _contract_kernel[(here, tiling.parts)](
            gram, centre.count, inner, S, first, piece.tiles, piece.low, piece.high, inner.shape[1], piece.first_piece,
            BI=tiling.rows, BJ=tiling.columns, PARTS=tiling.parts, BA=BA, BB=BB, BE=depth, FP32=tiling.fp32,
            INTERPRET=interpret, num_warps=warps, num_stages=3 if BA < 128 else 2,
        )  # fmt: skip


__all__ = ["FEW", "Pass", "Tiling", "add_inner_products", "plan", "tiles_of"]
