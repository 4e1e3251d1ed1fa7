"""The definition of every statistic in plain PyTorch: fallback where Triton does not run, and baseline of the kernels.

Everything is computed in float64. The states are upcast exactly whatever their dtype, no intermediate overflows or
cancels visibly, and neither autocast nor the TF32 settings of the training run reach a float64 product. Chunks keep the
float64 copies small.
"""

import torch
from torch import Tensor

from repflow.triton_kernels.groups import Groups

_CHUNK_BYTES = 4 * 2**20
"""Size of a float64 working chunk on a CPU: large enough to amortise the calls, small enough for its caches."""

_DEVICE_CHUNK_BYTES = 64 * 2**20
"""The same on a GPU, where a call costs more and memory is nearer."""

_GRAM_BYTES = 64 * 2**20
"""Size of the Gram rows of all states that are held at once."""

_MEAN_ROUNDING = 8 * torch.finfo(torch.float64).eps


@torch.no_grad()
def depth_statistics(states: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """Fields of `DepthStatistics`."""
    num_states, rows, tokens, _ = states.shape
    flat, valid = states.flatten(1, 2), groups.valid.flatten()
    out = torch.float64 if states.dtype == torch.float64 else torch.float32

    def empty(*lead: int) -> Tensor:
        return torch.full((*lead, rows * tokens), torch.nan, dtype=out, device=states.device)

    norm, cosine, distance = empty(num_states), empty(num_states - 1), empty(num_states - 1)
    curvature, spread = empty(num_states - 2), empty()
    nonfinite, zero = (torch.zeros(num_states, dtype=torch.int64, device=states.device) for _ in range(2))
    for part in _token_chunks(flat):
        x = flat[:, part].double()
        finite = _finite_tokens(flat[:, part])
        nonfinite += (valid[part] & ~finite).sum(-1)
        # NaN then spreads by itself to everything that touches a token that does not count.
        x = x.masked_fill(~(valid[part] & finite).unsqueeze(-1), torch.nan)
        length = torch.linalg.vector_norm(x, dim=-1)
        zero += (length == 0).sum(-1)
        unit = x / length.unsqueeze(-1)
        norm[:, part] = length.to(out)
        cosine[:, part] = (unit[1:] * unit[:-1]).sum(-1).to(out)
        distance[:, part] = ((unit[1:] - unit[:-1]).square().sum(-1) / 2).to(out)
        curvature[:, part] = (x[1:-1] - (x[:-2] + x[2:]) / 2).abs().mean(-1).to(out)
        spread[part] = (x - x.mean(0)).square_().mean(0).sqrt_().mean(-1).to(out)  # several times faster than x.std
    maps = (entry.unflatten(-1, (rows, tokens)) for entry in (norm, cosine, distance, curvature, spread))
    return *maps, nonfinite, zero


@torch.no_grad()
def token_sums(states: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """Fields of `TokenSums`."""
    num_states, _, _, features = states.shape
    flat, index = states.flatten(1, 2), groups.index.flatten()
    # One group more than there are takes the padding.
    index = torch.where(index < 0, groups.count, index)

    def empty(lead: int) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(lead, groups.count + 1, features, dtype=torch.float64, device=states.device)
        return sums, torch.zeros(lead, groups.count + 1, dtype=torch.int64, device=states.device)

    unit_sum, count = empty(num_states)
    update_unit_sum, update_count = empty(num_states - 1)
    for part in _token_chunks(flat):
        x = flat[:, part].double()
        for vectors, sums, counts in ((x, unit_sum, count), (x.diff(dim=0), update_unit_sum, update_count)):
            length = torch.linalg.vector_norm(vectors, dim=-1)
            directed = length.isfinite() & (length > 0)
            unit = torch.where(directed.unsqueeze(-1), vectors / length.unsqueeze(-1), 0.0)
            sums.index_add_(1, index[part], unit)
            counts.index_add_(1, index[part], directed.long())
    return tuple(entry[:, :-1] for entry in (unit_sum, count, update_unit_sum, update_count))


@torch.no_grad()
def similarity_gradient(
    state: Tensor, groups: Groups, weight: Tensor, target: float | None, onto: Tensor | None
) -> tuple[Tensor, ...]:
    """Fields of `SimilarityGradient`."""
    unit_sum, count = (entry[0] for entry in token_sums(state.unsqueeze(0), groups)[:2])
    measured, pairs = count > 1, count.double() * (count - 1)
    number = measured.sum()
    similarity = torch.where(measured, (unit_sum.square().sum(-1) - count) / pairs, 0.0).sum() / number
    wanted = measured if target is None else measured & (similarity > target)
    # One group more than there are takes the padding, and has no gradient.
    coefficient = torch.cat([torch.where(wanted, 2 * weight / (pairs * number), 0.0), count.new_zeros(1)])
    unit_sum = torch.cat([unit_sum, unit_sum.new_zeros(1, state.shape[-1])])
    flat, index = state.flatten(0, 1), torch.where(groups.index < 0, groups.count, groups.index).flatten()
    before = None if onto is None else onto.flatten(0, 1)
    gradient = torch.empty_like(flat, memory_format=torch.contiguous_format)
    squares = torch.zeros(2, dtype=torch.float64, device=state.device)
    for part in _token_chunks(flat.unsqueeze(0)):
        x, s, c = flat[part].double(), unit_sum[index[part]], coefficient[index[part]].unsqueeze(-1)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        unit = x / length
        push = c * (s - unit * (unit * s).sum(-1, keepdim=True)) / length
        push = torch.where((c != 0) & length.isfinite() & (length > 0), push, 0.0)
        squares[1] += push.square().sum()
        if before is None:
            gradient[part] = push.to(state.dtype)
        else:
            squares[0] += before[part].double().square().sum()
            gradient[part] = torch.where(push == 0, before[part], (before[part] + push).to(state.dtype))
    return gradient.view(state.shape), similarity, *squares.unbind()


@torch.no_grad()
def hsic_statistics(
    states: Tensor, token: Tensor, member: Tensor, estimator: str, min_tokens: int
) -> tuple[Tensor, ...]:
    """Fields of `HsicStatistics`, from the tokens `[G, n]` of every group and which entries of it are tokens."""
    flat = states.flatten(1, 2)
    finite = torch.stack([_finite_tokens(layer) for layer in flat])[:, token] & member
    alive = finite.any(-1)  # [S, G]
    member = member & (finite | ~alive.unsqueeze(-1)).all(0) & alive.any(0).unsqueeze(-1)
    count = member.sum(-1)
    n = count.double().view(-1, 1, 1)

    def centred(layer: int) -> Tensor:
        used = member & alive[layer].unsqueeze(1)
        x = torch.where(used.unsqueeze(-1), flat[layer][token].double(), 0.0)
        mean = x.sum(1, keepdim=True) / n
        # A deviation within the rounding of the mean is none: equal float64 tokens must give exactly zero.
        return torch.where(used.unsqueeze(-1) & ((x - mean).abs() > _MEAN_ROUNDING * mean.abs()), x - mean, 0.0)

    num_states, longest = len(flat), token.shape[1]
    inner = torch.zeros(len(token), num_states, num_states, dtype=torch.float64, device=states.device)
    square = inner.new_zeros(num_states, len(token), longest)
    panel = max(1, _GRAM_BYTES // (8 * num_states * max(1, token.numel())))
    for start in range(0, longest, panel):
        rows = slice(start, min(start + panel, longest))
        gram = inner.new_empty(num_states, len(token), rows.stop - start, longest)
        for layer in range(num_states):
            x = centred(layer)
            torch.bmm(x[:, rows], x.mT, out=gram[layer])
            diagonal = gram[layer].diagonal(start, 1, 2)
            square[layer, :, rows] = diagonal
            diagonal.zero_()
        flattened = gram.flatten(2).transpose(0, 1)
        inner += flattened @ flattened.mT
    square = square.transpose(0, 1)
    hsic = _estimate(estimator, inner, square, n)
    hsic = hsic.masked_fill(n < min_tokens, torch.nan)
    dead = ~alive.T
    hsic = hsic.masked_fill(dead.unsqueeze(1) | dead.unsqueeze(2), torch.nan)
    fourth = square.square()
    return hsic, count, fourth.sum(-1), fourth.amax(-1) if longest else fourth.sum(-1)


def _finite_tokens(flat: Tensor) -> Tensor:
    """Which tokens of `[..., D]` hold neither NaN nor infinity: the largest magnitude tells, and is found faster."""
    return flat.abs().amax(-1).isfinite()


def _token_chunks(flat: Tensor) -> list[slice]:
    """Slices of the tokens of `flat [S, N, D]` whose states fill one working chunk."""
    num_states, tokens, features = flat.shape
    chunk = _CHUNK_BYTES if flat.device.type == "cpu" else _DEVICE_CHUNK_BYTES
    step = max(1, chunk // (8 * num_states * features))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _estimate(estimator: str, inner: Tensor, square: Tensor, n: Tensor) -> Tensor:
    """HSIC `[G, S, S]` from ⟨K̃, L̃⟩ without diagonals, the squared norms `[G, S, n]`, and n `[G, 1, 1]`."""
    diagonal = square @ square.mT
    if estimator == "biased":
        return (inner + diagonal) / (n - 1).square()
    total = square.sum(-1)
    product = total.unsqueeze(-1) * total.unsqueeze(-2) / ((n - 1) * (n - 2))
    correction = 2 / (n - 2) * diagonal
    hsic = inner + product - correction
    # A self-HSIC below the rounding of its own terms is zero: states without structure must not look related to any
    # other.
    floor = torch.finfo(torch.float64).eps * n * (inner + product + correction)
    same = torch.eye(hsic.shape[-1], dtype=torch.bool, device=hsic.device)
    return hsic.masked_fill(same & (hsic <= floor), 0.0) / (n * (n - 3))


__all__ = ["depth_statistics", "hsic_statistics", "similarity_gradient", "token_sums"]
