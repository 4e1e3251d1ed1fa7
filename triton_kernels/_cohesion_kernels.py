# Triton's language is typed for its compiler, not for pyright.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
"""Kernels that add up the unit vectors of a group's tokens. `_stream.py` launches them.

Letters as in `_depth_kernels.py`, and: G groups, P pieces that the groups are cut into.
"""

import triton
import triton.language as tl

from repflow.triton_kernels._depth_kernels import is_finite, only_if, token_offset


@triton.jit
def _token(order, at, DOCUMENTS: tl.constexpr):
    """The token at place `at`."""
    if DOCUMENTS:
        return tl.load(order + at).to(tl.int32)
    return at


@triton.jit
def _unit(x, y, w, v, total, update_total):
    return total + x * w, update_total + (y - x) * v


@triton.jit
def _careful_sum(
    pointer, weight, order, low, high, feature, row_tokens, stride_b, stride_t, step,
    D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, DOCUMENTS: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """Σ of unit vectors in float64, without the tokens that have no direction, whatever they hold."""
    total = tl.zeros([BD], tl.float64)
    for at in range(low, high):
        n = _token(order, at, DOCUMENTS)
        w = tl.load(weight + n)
        if w != 0:
            origin = pointer + token_offset(n, row_tokens, stride_b, stride_t, ALIGN)
            inverse = w.to(tl.float64)
            if w != w:  # too long or too short for float32
                square = tl.zeros([BD], tl.float64)
                for block in range(0, D, BD):
                    place = block + tl.arange(0, BD)
                    x = tl.load(origin + place, mask=place < D, other=0.0).to(tl.float64)
                    if UPDATE:
                        x = tl.load(origin + step + place, mask=place < D, other=0.0).to(tl.float64) - x
                    square += x * x
                inverse = 1 / tl.sqrt(tl.sum(square, axis=0))
            x = tl.load(origin + feature, mask=feature < D, other=0.0).to(tl.float64)
            if UPDATE:
                x = tl.load(origin + step + feature, mask=feature < D, other=0.0).to(tl.float64) - x
            total += x * inverse
    return total.to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "num_states", "num_tokens", "row_tokens", "stride_s", "stride_b", "stride_t", "pieces", "chunks", "span",
    ],
)  # fmt: skip
def sum_kernel(
    states,  # [S, B, T, D]
    weights,  # [2S-1, N] float32: S of 1/‖h‖, S-1 of 1/‖Δh‖
    order,  # [N] int64: tokens, group by group
    begin,  # [G + 1] int64: where each group begins in `order`
    first,  # [G + 1] int64: the first piece of each group
    whose,  # [P] int64: the group of a piece
    sums,  # [2S-1, P, D] float32: S of h, S-1 of Δh
    num_states,
    num_tokens,
    row_tokens,
    stride_s,
    stride_b,
    stride_t,
    pieces,
    chunks,  # pieces of a group, where groups are rows
    span,  # tokens of a piece
    D: tl.constexpr,
    BD: tl.constexpr,
    ALIGN: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the unit vectors of four states and their updates, over the tokens of a chunk: one warp, one token at a time.

    Four states share what they read: each state is wanted twice, for itself and for the update that leads to it.
    """
    pid = tl.program_id(0)
    quads = (num_states + 3) // 4
    blocks: tl.constexpr = (D + BD - 1) // BD
    s = pid % quads * 4
    block = pid // quads % blocks
    piece = pieces - 1 - pid // quads // blocks  # backwards: the last tokens that the walk has read are in the cache
    if DOCUMENTS:
        group = tl.load(whose + piece).to(tl.int32)
        low = (tl.load(begin + group) + (piece - tl.load(first + group)) * span).to(tl.int32)
        high = tl.load(begin + group + 1).to(tl.int32)
    else:
        group = piece // chunks
        low = group * row_tokens + piece % chunks * span
        high = (group + 1) * row_tokens
    high = tl.minimum(high, low + span)
    feature = block * BD + tl.arange(0, BD)
    known = feature < D
    PARTIAL: tl.constexpr = D % BD != 0

    last = num_states - 1
    step = stride_s.to(tl.int64) * ALIGN
    # Beyond the last state it is read again; those sums are not stored.
    h0 = states + s * step
    h1 = states + tl.minimum(s + 1, last) * step
    h2 = states + tl.minimum(s + 2, last) * step
    h3 = states + tl.minimum(s + 3, last) * step
    h4 = states + tl.minimum(s + 4, last) * step
    row = num_tokens.to(tl.int64)
    w0 = weights + s * row
    w1 = weights + tl.minimum(s + 1, last) * row
    w2 = weights + tl.minimum(s + 2, last) * row
    w3 = weights + tl.minimum(s + 3, last) * row
    v = num_states + s
    v0 = weights + tl.minimum(v, 2 * last) * row
    v1 = weights + tl.minimum(v + 1, 2 * last) * row
    v2 = weights + tl.minimum(v + 2, 2 * last) * row
    v3 = weights + tl.minimum(v + 3, 2 * last) * row
    t0 = tl.zeros([BD], tl.float32)
    t1 = tl.zeros([BD], tl.float32)
    t2 = tl.zeros([BD], tl.float32)
    t3 = tl.zeros([BD], tl.float32)
    u0 = tl.zeros([BD], tl.float32)
    u1 = tl.zeros([BD], tl.float32)
    u2 = tl.zeros([BD], tl.float32)
    u3 = tl.zeros([BD], tl.float32)
    for at in tl.range(low, high, num_stages=STAGES):
        n = _token(order, at, DOCUMENTS)
        place = token_offset(n, row_tokens, stride_b, stride_t, ALIGN) + feature
        if PARTIAL:
            x0 = tl.load(h0 + place, mask=known, other=0.0).to(tl.float32)
            x1 = tl.load(h1 + place, mask=known, other=0.0).to(tl.float32)
            x2 = tl.load(h2 + place, mask=known, other=0.0).to(tl.float32)
            x3 = tl.load(h3 + place, mask=known, other=0.0).to(tl.float32)
            x4 = tl.load(h4 + place, mask=known, other=0.0).to(tl.float32)
        else:
            x0 = tl.load(h0 + place).to(tl.float32)
            x1 = tl.load(h1 + place).to(tl.float32)
            x2 = tl.load(h2 + place).to(tl.float32)
            x3 = tl.load(h3 + place).to(tl.float32)
            x4 = tl.load(h4 + place).to(tl.float32)
        t0, u0 = _unit(x0, x1, tl.load(w0 + n), tl.load(v0 + n), t0, u0)
        t1, u1 = _unit(x1, x2, tl.load(w1 + n), tl.load(v1 + n), t1, u1)
        t2, u2 = _unit(x2, x3, tl.load(w2 + n), tl.load(v2 + n), t2, u2)
        t3, u3 = _unit(x3, x4, tl.load(w3 + n), tl.load(v3 + n), t3, u3)

    plane = pieces.to(tl.int64) * D
    target = sums + s * plane + piece.to(tl.int64) * D + feature
    update = target + num_states * plane
    # A token without a direction has weight 0, but 0 · NaN is not 0; a weight of NaN asks for more than float32.
    if tl.max((~is_finite(t0 + t1 + t2 + t3 + u0 + u1 + u2 + u3)).to(tl.int32), axis=0) > 0:
        for k in range(s, tl.minimum(s + 4, num_states)):
            pointer = states + k * step
            total = _careful_sum(
                pointer, weights + k * row, order, low, high, feature, row_tokens, stride_b, stride_t, step,
                D, BD, ALIGN, DOCUMENTS, False,
            )  # fmt: skip
            tl.store(target, total, mask=known)
            if k < last:
                total = _careful_sum(
                    pointer, weights + (num_states + k) * row, order, low, high, feature, row_tokens, stride_b,
                    stride_t, step, D, BD, ALIGN, DOCUMENTS, True,
                )  # fmt: skip
                tl.store(update, total, mask=known)
            target += plane
            update += plane
    else:
        tl.store(target, t0, mask=known)
        tl.store(target + plane, t1, mask=only_if(s + 1 <= last, known))
        tl.store(target + 2 * plane, t2, mask=only_if(s + 2 <= last, known))
        tl.store(target + 3 * plane, t3, mask=only_if(s + 3 <= last, known))
        tl.store(update, u0, mask=only_if(s + 1 <= last, known))
        tl.store(update + plane, u1, mask=only_if(s + 2 <= last, known))
        tl.store(update + 2 * plane, u2, mask=only_if(s + 3 <= last, known))
        tl.store(update + 3 * plane, u3, mask=only_if(s + 4 <= last, known))


@triton.jit(do_not_specialize=["num_tokens", "row_tokens", "groups", "pieces", "chunks"])
def total_kernel(
    sums,  # [2S-1, P, D] float32
    weights,  # [2S-1, N] float32
    order,  # [N] int64
    begin,  # [G + 1] int64
    first,  # [G + 1] int64
    unit_sum,  # [2S-1, G, D] float64
    count,  # [2S-1, G] int64
    num_tokens,
    row_tokens,
    groups,
    pieces,
    chunks,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Add the pieces of every group in float64, and count the tokens that have a direction."""
    cell = tl.program_id(0)
    group = cell % groups
    row = (cell // groups).to(tl.int64)
    if DOCUMENTS:
        low = tl.load(begin + group).to(tl.int32)
        high = tl.load(begin + group + 1).to(tl.int32)
        piece = tl.load(first + group).to(tl.int32)
        end = tl.load(first + group + 1).to(tl.int32)
    else:
        low = group * row_tokens
        high = low + row_tokens
        piece = group * chunks
        end = piece + chunks
    feature = tl.program_id(1) * BD + tl.arange(0, BD)
    known = feature < D
    total = tl.zeros((BD,), tl.float64)
    for at in tl.range(piece, end, loop_unroll_factor=4):
        total += tl.load(sums + (row * pieces + at) * D + feature, mask=known, other=0.0).to(tl.float64)
    tl.store(unit_sum + cell.to(tl.int64) * D + feature, total, mask=known)
    if tl.program_id(1) == 0:
        number = tl.zeros([BT], tl.int32)
        for start in range(low, high, BT):
            place = start + tl.arange(0, BT)
            inside = place < high
            if DOCUMENTS:
                place = tl.load(order + place, mask=inside, other=0).to(tl.int32)
            number += (tl.load(weights + row * num_tokens + place, mask=inside, other=0.0) != 0).to(tl.int32)
        tl.store(count + cell, tl.sum(number.to(tl.int64), axis=0))
