# Triton's language is typed for its compiler, not for pyright.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
"""Kernels that follow tokens through depth. `_stream.py` launches them.

Letters: S states, N = B·T tokens, D features, F blocks of features. Strides come divided by ALIGN, so that the compiler
knows what divides them without compiling once per T.
"""

import triton
import triton.language as tl


@triton.jit
def token_offset(n, row_tokens, stride_b, stride_t, ALIGN: tl.constexpr):
    """Offset of tokens `n` of the flattened batch, in elements, as int64."""
    row = n // row_tokens
    return (row.to(tl.int64) * stride_b + (n - row * row_tokens).to(tl.int64) * stride_t) * ALIGN


@triton.jit
def only_if(flag, mask):
    """`mask & flag` of a scalar flag, which Triton's interpreter would turn into integers."""
    return tl.where(flag, mask, mask != mask)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")  # x − x would be contracted with the product that x came from


@triton.jit
def _valid_tokens(valid, n, num_tokens, HAS_MASK: tl.constexpr):
    inside = n < num_tokens
    if HAS_MASK:
        inside = inside & (tl.load(valid + n, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _tile_sum(x):
    """[BT, R, W] -> [BT]. As one axis, so that a thread adds what it holds before threads add to each other."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2]]), axis=1)


@triton.jit
def _walk_step(
    here, first, before, change, away, total, total_square, square, update, bend, inside, bends,
    EXACT: tl.constexpr, WITH_DEPTH: tl.constexpr,
):  # fmt: skip
    """One state further: its sums, and what the next step and the spread need."""
    step = here - before
    tl.store(square, _tile_sum(here * here), mask=inside)
    tl.store(update, _tile_sum(step * step), mask=inside)
    if WITH_DEPTH:
        tl.store(bend, _tile_sum(tl.abs(step - change)), mask=bends)
        # Differences of 16-bit numbers are exact in float32 or tiny beside the spread: `first` need not be kept.
        away = away + step if EXACT else here - first
        total += away
        total_square += away * away
    return here, step, away, total, total_square


@triton.jit(do_not_specialize=["num_states", "num_tokens", "row_tokens", "stride_s", "stride_b", "stride_t"])
def walk_kernel(
    states,  # [S, B, T, D]
    valid,  # [N] uint8
    partial,  # [·, F, N] float32, sums over a block: S of h², S-1 of Δh², S-2 of |second difference|, 1 of the std
    num_states,
    num_tokens,
    row_tokens,
    stride_s,
    stride_b,
    stride_t,
    D: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WITH_DEPTH: tl.constexpr,
):
    """Follow a tile of BT tokens and R·W features through depth, and read every state once.

    What bounds it after memory is the number of instructions: two states per turn save the moves between `here` and
    `before`, one warp per program the barriers, and asynchronous copies the registers for what is on its way.
    """
    F: tl.constexpr = (D + R * W - 1) // (R * W)
    block = tl.program_id(0) % F
    n = tl.program_id(0) // F * BT + tl.arange(0, BT)
    inside = n < num_tokens
    # Padding reads token 0 instead, which is in the cache: cheaper than masks, and its sums are not looked at.
    token = tl.where(_valid_tokens(valid, n, num_tokens, HAS_MASK), n, 0)
    feature = block * R * W + tl.arange(0, R)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    pointer = states + token_offset(token, row_tokens, stride_b, stride_t, ALIGN)[:, None, None] + feature
    known = (feature < D) & (token >= 0)[:, None, None]  # the second gives the shape of a tile
    PARTIAL: tl.constexpr = D % (R * W) != 0
    step_s = stride_s.to(tl.int64) * ALIGN
    plane = num_tokens.to(tl.int64) * F
    last = num_states - 1
    square = partial + block.to(tl.int64) * num_tokens + n
    update = square + num_states * plane
    bend = update + last * plane

    first = (tl.load(pointer, mask=known, other=0.0) if PARTIAL else tl.load(pointer)).to(tl.float32)
    tl.store(square, _tile_sum(first * first), mask=inside)
    before = first
    change = first * 0.0
    away = first * 0.0
    total = tl.zeros_like(first)
    total_square = tl.zeros_like(first)
    for s in tl.range(1, last, 2, num_stages=STAGES):
        this = pointer + s * step_s
        one = tl.load(this, mask=known, other=0.0) if PARTIAL else tl.load(this)
        two = tl.load(this + step_s, mask=known, other=0.0) if PARTIAL else tl.load(this + step_s)
        before, change, away, total, total_square = _walk_step(
            one.to(tl.float32), first, before, change, away, total, total_square,
            square + s * plane, update + (s - 1) * plane, bend + (s - 2) * plane, inside,
            only_if(s >= 2, inside), EXACT, WITH_DEPTH,
        )  # fmt: skip
        before, change, away, total, total_square = _walk_step(
            two.to(tl.float32), first, before, change, away, total, total_square,
            square + (s + 1) * plane, update + s * plane, bend + (s - 1) * plane, inside, inside,
            EXACT, WITH_DEPTH,
        )  # fmt: skip
    if num_states % 2 == 0:
        this = pointer + last * step_s
        one = tl.load(this, mask=known, other=0.0) if PARTIAL else tl.load(this)
        before, change, away, total, total_square = _walk_step(
            one.to(tl.float32), first, before, change, away, total, total_square,
            square + last * plane, update + (last - 1) * plane,
            bend + (last - 2) * plane, inside, only_if(last >= 2, inside), EXACT, WITH_DEPTH,
        )  # fmt: skip
    if WITH_DEPTH:
        count = num_states.to(tl.float32)
        variance = (total_square - total * total / count) / count
        variance = tl.where(variance < 0, 0.0, variance)  # keeps NaN, unlike tl.maximum
        tl.store(bend + (last - 1) * plane, _tile_sum(tl.sqrt(variance)), mask=inside)


@triton.jit
def _block_sum(partial, n, num_tokens, used, F: tl.constexpr):
    """[F, N] -> [BT] in float64."""
    total = tl.zeros(n.shape, tl.float64)
    plane = num_tokens.to(tl.int64)
    for f in tl.static_range(F):  # unrolled, so that all loads are on their way at once
        total += tl.load(partial + f * plane + n, mask=used, other=0.0).to(tl.float64)
    return total


@triton.jit
def _in_range(square, TINY: tl.constexpr, HUGE: tl.constexpr):
    return (square >= TINY) & (square <= HUGE)


@triton.jit
def _weight(square, directed):
    """1/‖·‖ in float32: 0 where there is no direction, NaN where float32 would be too narrow for it."""
    length = tl.sqrt(tl.where(directed, square, 1.0))
    inverse = tl.where((length > 1e-30) & (length < 1e30), 1 / length, float("nan"))
    return tl.where(directed, inverse, 0.0).to(tl.float32)


@triton.jit
def _distance(a, b, u):
    """1 − cos of x and y from a = ‖x‖², b = ‖y‖² and u = ‖y − x‖²."""
    between = tl.sqrt(a) - tl.sqrt(b)
    return (u - between * between) / (2 * tl.sqrt(a) * tl.sqrt(b))


@triton.jit
def _exact_pair(pointer, step, wanted, has_next, column, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """‖x‖², ‖y‖², ‖y − x‖² and x·y in float64, of the tokens x that are `wanted` and y one state later."""
    a = tl.zeros((BT,), tl.float64)
    b = tl.zeros((BT,), tl.float64)
    u = tl.zeros((BT,), tl.float64)
    dot = tl.zeros((BT,), tl.float64)
    for start in tl.range(0, D, BD, num_stages=3):
        here = wanted[:, None] & (column + start < D)
        x = tl.load(pointer + start, mask=here, other=0.0).to(tl.float64)
        y = tl.load(pointer + step + start, mask=only_if(has_next, here), other=0.0).to(tl.float64)
        a += tl.sum(x * x, axis=1)
        b += tl.sum(y * y, axis=1)
        u += tl.sum((y - x) * (y - x), axis=1)
        dot += tl.sum(x * y, axis=1)
    return a, b, u, dot


@triton.jit(do_not_specialize=["num_states", "num_tokens", "row_tokens", "stride_s", "stride_b", "stride_t"])
def finish_kernel(
    states,  # [S, B, T, D]
    valid,  # [N] uint8
    partial,  # as the walk left it
    maps,  # [4S-3, N] float32: S norms, S-1 cosines, S-1 distances, S-2 curvatures, 1 spread
    weights,  # [2S-1, N] float32: S of 1/‖h‖, S-1 of 1/‖Δh‖
    counts,  # [2, S] int64: non-finite, zero
    num_states,
    num_tokens,
    row_tokens,
    stride_s,
    stride_b,
    stride_t,
    D: tl.constexpr,
    F: tl.constexpr,
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
    ALLOWED: tl.constexpr,
):
    """Add the blocks of features up in float64 and write the maps.

    A token whose float32 sums cannot be trusted (non-finite, near over- or underflow, or a distance that cancels) is
    read again and computed in float64; nobody waits to learn which.
    """
    s = tl.program_id(1)
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = n < num_tokens
    used = _valid_tokens(valid, n, num_tokens, HAS_MASK)
    plane = num_tokens.to(tl.int64) * F
    nan = float("nan")
    column = tl.arange(0, BD)[None, :]
    origin = states + token_offset(n, row_tokens, stride_b, stride_t, ALIGN)[:, None] + column
    step_s = stride_s.to(tl.int64) * ALIGN
    square = partial + s * plane
    update = square + num_states * plane
    bend = update + (num_states - 1) * plane
    row = num_tokens.to(tl.int64)
    if s < num_states:
        next1 = s + 1 < num_states
        next2 = s + 2 < num_states
        a = _block_sum(square, n, num_tokens, used, F)
        b = _block_sum(square + plane, n, num_tokens, only_if(next1, used), F)
        u = _block_sum(update, n, num_tokens, only_if(next1, used), F)
        distance = _distance(a, b, u)
        error = ROUNDING * (u + tl.abs(a - b)) / (2 * tl.sqrt(a) * tl.sqrt(b))
        trusted = _in_range(b, TINY, HUGE) & _in_range(u, TINY, HUGE)
        trusted = trusted & (error <= tl.minimum(tl.maximum(5e-4 * distance, 5e-9), ALLOWED))
        doubtful = used & (~_in_range(a, TINY, HUGE) | only_if(next1, ~trusted))
        if tl.max(doubtful.to(tl.int32), axis=0) > 0:
            exact_a, exact_b, exact_u, dot = _exact_pair(
                origin + s * step_s, step_s, doubtful, next1, column, D, BT, BD
            )
            a = tl.where(doubtful, exact_a, a)
            b = tl.where(doubtful, exact_b, b)
            u = tl.where(doubtful, exact_u, u)
            # In Δh nothing cancels but where the length changes much; there 1 − cos does not.
            longer = u + tl.abs(a - b) > 2 * tl.sqrt(a) * tl.sqrt(b)
            exact = tl.where(longer, 1 - dot / tl.sqrt(a) / tl.sqrt(b), _distance(a, b, u))
            distance = tl.where(doubtful, tl.maximum(exact, 0.0), distance)
        finite = used & is_finite(a)
        both = finite & is_finite(b)
        if WITH_DEPTH:
            norm = maps + s * row + n
            cosine = norm + num_states * row
            turn = cosine + (num_states - 1) * row
            curvature = turn + (num_states - 1) * row
            tl.store(norm, tl.where(finite, tl.sqrt(a), nan).to(tl.float32), mask=inside)
            directed = both & (a > 0) & (b > 0)
            tl.store(cosine, tl.where(directed, 1 - distance, nan).to(tl.float32), mask=only_if(next1, inside))
            tl.store(turn, tl.where(directed, distance, nan).to(tl.float32), mask=only_if(next1, inside))
            bent = _block_sum(bend, n, num_tokens, only_if(next2, used), F) * (0.5 / D)
            # Differences with something non-finite are non-finite.
            bent = tl.where(used & is_finite(bent), bent, nan).to(tl.float32)
            tl.store(curvature, bent, mask=only_if(next2, inside))
            tl.atomic_add(counts + s, tl.sum((used & ~finite).to(tl.int64), axis=0))
            tl.atomic_add(counts + num_states + s, tl.sum((finite & (a == 0)).to(tl.int64), axis=0))
        if WITH_WEIGHTS:
            weight = weights + s * row + n
            tl.store(weight, _weight(a, finite & (a > 0)), mask=inside)
            tl.store(weight + num_states * row, _weight(u, both & (u > 0)), mask=only_if(next1, inside))
    elif WITH_DEPTH:
        wide = _block_sum(partial + 3 * (num_states - 1) * plane, n, num_tokens, used, F)
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
        wide = tl.where(used & is_finite(wide), wide / D, nan)
        tl.store(maps + 4 * (num_states - 1) * row + n, wide.to(tl.float32), mask=inside)
