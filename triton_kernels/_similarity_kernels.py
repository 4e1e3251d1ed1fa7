# Triton's language is typed for its compiler, not for pyright.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
"""Kernels behind `similarity_gradient`. `_similarity.py` launches them.

Letters: N = B·T tokens, D features, G groups, P pieces that the groups are cut into, F blocks of features. A program
holds whole tokens, BD ≥ D features of each. Strides come divided by ALIGN.
"""

import triton
import triton.language as tl

from repflow.triton_kernels._depth_kernels import is_finite, only_if, token_offset

_TINY = tl.constexpr(1e-24)
_HUGE = tl.constexpr(1e36)
"""Sums of squares in float32 outside these may have lost digits."""
_RAISE = tl.constexpr(2.0**100)
_LOWER = tl.constexpr(2.0**-80)


@triton.jit
def _load_tokens(pointer, n, inside, feature, row_tokens, stride_b, stride_t, D: tl.constexpr, ALIGN: tl.constexpr):
    """[BT, BD], 0 where there is nothing."""
    place = token_offset(n, row_tokens, stride_b, stride_t, ALIGN)
    return tl.load(
        pointer + place[:, None] + feature[None, :], mask=inside[:, None] & (feature < D)[None, :], other=0.0
    )


@triton.jit
def _unit_vectors(loaded, inside):
    """Unit vectors [BT, BD]; a and b [BT], ab = 1/‖h‖; and which tokens have a direction [BT]."""
    x = loaded.to(tl.float32)
    square = tl.sum(x * x, axis=1)
    usual = (square > _TINY) & (square < _HUGE)
    directed = inside & usual
    inverse = 1 / tl.sqrt(tl.where(usual, square, 1.0))
    scale = tl.where(usual, 1.0, 1.0)
    # Without a direction, not finite, or too long or too short for the square: by a power of two it becomes usual.
    if tl.max((inside & ~usual).to(tl.int32), axis=0) > 0:
        largest = tl.max(tl.abs(x), axis=1)
        finite = tl.sum((~is_finite(x)).to(tl.int32), axis=1) == 0
        scale = tl.where(largest < 1e-15, _RAISE, tl.where(largest > 1e15, _LOWER, 1.0))
        x = x * scale[:, None]
        square = tl.sum(x * x, axis=1)
        directed = inside & finite & (largest > 0)
        inverse = 1 / tl.sqrt(tl.where(directed, square, 1.0))
    return tl.where(directed[:, None], x * inverse[:, None], 0.0), inverse, scale, directed


@triton.jit(do_not_specialize=["row_tokens", "stride_b", "stride_t", "chunks", "span"])
def unit_sum_kernel(
    state,  # [B, T, D]
    valid,  # [N] uint8
    order,  # [N] int64: tokens, group by group
    begin,  # [G + 1] int64: where each group begins in `order`
    first,  # [G + 1] int64: the first piece of each group
    whose,  # [P] int64: the group of a piece
    sums,  # [P, D] float32
    counts,  # [P] int32
    row_tokens,
    stride_b,
    stride_t,
    chunks,  # pieces of a group, where groups are rows
    span,  # tokens of a piece
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the unit vectors of a piece, reading each token once."""
    piece = tl.program_id(0)
    if DOCUMENTS:
        group = tl.load(whose + piece).to(tl.int32)
        low = (tl.load(begin + group) + (piece - tl.load(first + group)) * span).to(tl.int32)
        high = tl.load(begin + group + 1).to(tl.int32)
    else:
        group = piece // chunks
        low = group * row_tokens + piece % chunks * span
        high = (group + 1) * row_tokens
    high = tl.minimum(high, low + span)
    feature = tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    number = tl.zeros([BT], tl.int32)
    for start in tl.range(low, high, BT, num_stages=STAGES):
        at = start + tl.arange(0, BT)
        inside = at < high
        if DOCUMENTS:
            n = tl.load(order + at, mask=inside, other=0).to(tl.int32)
        else:
            n = at
            if HAS_MASK:
                inside = inside & (tl.load(valid + n, mask=inside, other=0) != 0)
        loaded = _load_tokens(state, n, inside, feature, row_tokens, stride_b, stride_t, D, ALIGN)
        unit, _, _, directed = _unit_vectors(loaded, inside)
        total += tl.sum(unit, axis=0)
        number += directed.to(tl.int32)
    tl.store(sums + piece.to(tl.int64) * D + feature, total, mask=feature < D)
    tl.store(counts + piece, tl.sum(number, axis=0))


@triton.jit(do_not_specialize=["chunks"])
def group_sum_kernel(
    sums,  # [P, D] float32
    counts,  # [P] int32
    first,  # [G + 1] int64
    unit_sum,  # [G, D] float32
    squares,  # [G, F] float64
    count,  # [G] int64
    chunks,
    D: tl.constexpr,
    BD: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Add the pieces of every group in float64: s, the share of a block of features in ‖s‖², and n."""
    group = tl.program_id(0)
    block = tl.program_id(1)
    if DOCUMENTS:
        piece = tl.load(first + group).to(tl.int32)
        end = tl.load(first + group + 1).to(tl.int32)
    else:
        piece = group * chunks
        end = piece + chunks
    feature = block * BD + tl.arange(0, BD)
    known = feature < D
    total = tl.zeros([BD], tl.float64)
    number = tl.zeros([1], tl.int64)
    source = sums + piece.to(tl.int64) * D + feature
    for at in tl.range(piece, end, loop_unroll_factor=4):
        total += tl.load(source, mask=known, other=0.0).to(tl.float64)
        number += tl.load(counts + at).to(tl.int64)
        source += D
    group = group.to(tl.int64)
    tl.store(unit_sum + group * D + feature, total.to(tl.float32), mask=known)
    tl.store(squares + group * tl.num_programs(1) + block, tl.sum(total * total, axis=0))
    if block == 0:
        tl.store(count + group + tl.arange(0, 1), number)


@triton.jit(do_not_specialize=["groups"])
def coefficient_kernel(
    squares,  # [G, F] float64
    count,  # [G] int64
    weight,  # [1] float64
    similarity,  # [1] float64
    coefficient,  # [G] float32
    groups,
    F: tl.constexpr,
    BG: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The mean over groups of (‖s‖² − n)/(n(n − 1)), and what each group's gradient is multiplied with. One program."""
    total = tl.zeros([BG], tl.float64)
    measured = tl.zeros([BG], tl.float64)
    for start in range(0, groups, BG):
        group = start + tl.arange(0, BG)
        n = tl.load(count + group, mask=group < groups, other=0).to(tl.float64)
        square = tl.zeros([BG], tl.float64)
        for block in range(F):
            square += tl.load(squares + group.to(tl.int64) * F + block, mask=group < groups, other=0.0)
        total += tl.where(n > 1, (square - n) / tl.where(n > 1, n * (n - 1), 1.0), 0.0)
        measured += (n > 1).to(tl.float64)
    number = tl.sum(measured, axis=0)
    mean = tl.sum(total, axis=0) / tl.where(number > 0, number, 1.0)
    mean = tl.where(number > 0, mean, float("nan"))
    tl.store(similarity, mean)
    factor = tl.where(mean > TARGET, 2 * tl.load(weight) / tl.where(number > 0, number, 1.0), 0.0)
    for start in range(0, groups, BG):
        group = start + tl.arange(0, BG)
        n = tl.load(count + group, mask=group < groups, other=0).to(tl.float64)
        each = tl.where(n > 1, factor / tl.where(n > 1, n * (n - 1), 1.0), 0.0)
        tl.store(coefficient + group, each.to(tl.float32), mask=group < groups)


@triton.jit(
    do_not_specialize=["num_tokens", "row_tokens", "stride_b", "stride_t", "onto_b", "onto_t", "chunks", "span"]
)
def gradient_kernel(
    state,  # [B, T, D]
    onto,  # [B, T, D]
    valid,  # [N] uint8
    index,  # [N] int64: the group of each token
    unit_sum,  # [G, D] float32
    coefficient,  # [G] float32
    gradient,  # [N, D]
    norms,  # [2, programs] float32: ‖onto‖² and ‖what is added‖²
    num_tokens,
    row_tokens,
    stride_b,
    stride_t,
    onto_b,
    onto_t,
    chunks,
    span,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_ONTO: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write onto + c·(I − u uᵀ)s/‖h‖ of each token, c and s of its group."""
    program = tl.program_id(0)
    piece = tl.num_programs(0) - 1 - program  # backwards: the last tokens that the sums have read are in the cache
    low = piece // chunks * row_tokens + piece % chunks * span
    high = tl.minimum((piece // chunks + 1) * row_tokens, low + span)
    feature = tl.arange(0, BD)
    known = feature < D
    if not DOCUMENTS:
        group = (piece // chunks).to(tl.int64)
        c = tl.load(coefficient + group)
        s = tl.load(unit_sum + group * D + feature, mask=known, other=0.0)[None, :]
    own = tl.zeros([BT], tl.float32)
    added = tl.zeros([BT], tl.float32)
    for start in tl.range(low, high, BT, num_stages=STAGES):
        n = start + tl.arange(0, BT)
        inside = n < high
        counts = inside
        if DOCUMENTS:
            group = tl.load(index + n, mask=inside, other=-1)
            counts = group >= 0
            group = tl.where(counts, group, 0)
            c = tl.load(coefficient + group, mask=counts, other=0.0)
            s = tl.load(
                unit_sum + group[:, None] * D + feature[None, :], mask=counts[:, None] & known[None, :], other=0.0
            )
        elif HAS_MASK:
            counts = inside & (tl.load(valid + n, mask=inside, other=0) != 0)
        counts = only_if(c != 0, counts)
        loaded = _load_tokens(state, n, counts, feature, row_tokens, stride_b, stride_t, D, ALIGN)
        unit, inverse, scale, directed = _unit_vectors(loaded, counts)
        along = tl.sum(unit * s, axis=1)
        push = (s - unit * along[:, None]) * (c * inverse)[:, None] * scale[:, None]
        push = tl.where(directed[:, None], push, 0.0)
        result = push
        if HAS_ONTO:
            before = _load_tokens(onto, n, inside, feature, row_tokens, onto_b, onto_t, D, ALIGN).to(tl.float32)
            # A zero would be added to no effect, but for the sign of a zero.
            result = tl.where(push == 0, before, before + push)
            own += tl.sum(before * before, axis=1)
        added += tl.sum(push * push, axis=1)
        target = gradient + n.to(tl.int64)[:, None] * D + feature[None, :]
        tl.store(target, result.to(gradient.dtype.element_ty), mask=inside[:, None] & known[None, :])
    if HAS_ONTO:
        tl.store(norms + program, tl.sum(own, axis=0))
    else:
        tl.store(norms + program, 0.0)
    tl.store(norms + tl.num_programs(0) + program, tl.sum(added, axis=0))
