"""The token-contrastive term of SimCTG (arXiv 2202.06417, Eq. 2), and its gradient."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from repflow.triton_kernels.groups import Groups, group_members

_COSINES = 2**24
"""Most cosines that are held at once."""


@torch.no_grad()
def contrastive_gradient(
    state: Float[Tensor, "B T D"], groups: Groups, target: float
) -> tuple[Float[Tensor, "B T D"], Float64[Tensor, ""]]:
    """Gradient of the mean over pairs of max(0, cos − target), and that mean, averaged over groups.

    SimCTG's mean over i ≠ j of max(0, ρ − 1 + cos(h_i, h_j)), with the margin ρ = 1 − target. Unlike the similarity it
    needs the cosine of each pair: n² D operations for a group of n tokens, some rows of them at a time. Groups of less
    than two tokens are left out, and tokens without a direction, too.

    Args:
        state: h^(l).
        groups: of its tokens.
        target: the cosine above which a pair is pushed apart.

    Returns:
        The gradient in float32, in float64 for a float64 state; the value, NaN without a group of two tokens.
    """
    dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
    flat = state.flatten(0, 1)
    push = torch.zeros(flat.shape, dtype=dtype, device=state.device)
    value = torch.zeros((), dtype=torch.float64, device=state.device)
    number = torch.zeros((), dtype=torch.float64, device=state.device)
    with torch.autocast(state.device.type, enabled=False):
        for token, member in zip(*group_members(groups), strict=True):
            part, total, pairs = _of_group(flat[token].double(), member, target, dtype)
            push.index_add_(0, token, torch.where(pairs > 0, 2 * part / pairs.clamp(min=1), 0.0).to(dtype))
            value += torch.where(pairs > 0, total / pairs.clamp(min=1), 0.0)
            number += pairs > 0
    return (push / number.clamp(min=1)).view(state.shape), torch.where(number > 0, value / number, torch.nan)


def _of_group(x: Tensor, member: Tensor, target: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the pairs' summed gradient [n, D], their summed value [], and their number []."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    directed = member.unsqueeze(-1) & length.isfinite() & (length > 0)
    unit = torch.where(directed, x / length, 0.0).to(dtype)
    total, pulls = torch.zeros((), dtype=torch.float64, device=x.device), []
    for rows in torch.arange(len(unit), device=x.device).split(max(1, _COSINES // max(1, len(unit)))):
        cosine = unit[rows] @ unit.mT
        near = (cosine > target) & directed[rows] & directed.mT
        near[torch.arange(len(rows), device=x.device), rows] = False
        total += torch.where(near, cosine.double() - target, 0.0).sum()
        pulls.append(near.to(dtype) @ unit)
    pull = torch.cat(pulls)
    across = pull - unit * (unit * pull).sum(-1, keepdim=True)
    count = directed.sum().double()
    return torch.where(directed, across / length, 0.0), total, count * (count - 1)
