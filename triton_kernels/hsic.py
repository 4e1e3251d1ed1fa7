"""HSIC of every pair of states, with the tokens of a group as examples."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from repflow.triton_kernels import reference
from repflow.triton_kernels._dispatch import use_triton
from repflow.triton_kernels._inputs import check_mask, check_states
from repflow.triton_kernels.groups import Groups, find_groups, group_members

Estimator = Literal["unbiased", "biased"]

MIN_TOKENS: dict[str, int] = {"unbiased": 4, "biased": 2}
"""Fewest tokens for which an estimator is defined."""


class HsicStatistics(NamedTuple):
    """HSIC per group, and how much of it hangs on one token."""

    hsic: Float64[Tensor, "G S S"]
    """HSIC of every pair of states; NaN for groups with too few tokens, and for states without a finite token."""
    count: Int64[Tensor, " G"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """Tokens used: valid, and finite in every state that has a finite token."""
    fourth_moment: Float64[Tensor, "G S"]
    """Σ_t ‖x_t‖⁴ over the centred tokens."""
    fourth_moment_max: Float64[Tensor, "G S"]
    """The largest ‖x_t‖⁴."""

    def enough(self, estimator: Estimator) -> Bool[Tensor, " G"]:
        """Which groups have the tokens that `estimator` needs: 4 for the unbiased one, 2 for the biased one."""
        return self.count >= MIN_TOKENS[estimator]

    def usable(self, estimator: Estimator) -> Bool[Tensor, " G"]:
        """Which groups to add up: those with enough tokens, and finite ones only where there are any.

        One sequence that is NaN at some depth then does not hide what the others tell; when all of them are, the NaN in
        the row and column of that state is the result.
        """
        enough = self.enough(estimator)
        whole = enough & self.hsic.isfinite().flatten(1).all(1)
        return torch.where(whole.any(), whole, enough)


def hsic_statistics(
    states: Float[Tensor, "S B T D"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | Groups | None = None,
    *,
    estimator: Estimator = "unbiased",
    selected: Int64[Tensor, "R K"] | None = None,
) -> HsicStatistics:
    """HSIC of every pair of states with linear kernels, per group, over the centred tokens x.

    biased (Kornblith et al. 2019): HSIC₀ = ⟨K, L⟩/(n − 1)², K = X Xᵀ.
    unbiased (Song et al. 2012, Nguyen et al. 2021), n ≥ 4: with a_i = ‖x_i‖² of one state and b_i of the other, and K̃,
    L̃ the Grams with a zero diagonal, HSIC₁ = [⟨K̃, L̃⟩ + Σa Σb/((n − 1)(n − 2)) − 2/(n − 2)·Σ a_i b_i] / (n(n − 3)):
    row i of the centred K̃ sums to −a_i, so no row sums are needed.

    Args:
        states: h^(0) … h^(L), in float16, bfloat16, float32 or float64.
        mask: attention mask (one group per row) or document numbers (one group per document); 0 is padding. Or what
            `find_groups` makes of it.
        estimator: "unbiased" or "biased".
        selected: the tokens that are meant, as positions in the flattened batch; the mask is then of these, `[R, K]`.
            None: all of the batch. Nothing is checked of the positions, which would wait for a GPU.

    Returns:
        Everything in float64, counts in int64. A token that is non-finite in some state is left out of all states, so
        that every pair sees the same tokens; a state without any finite token gives NaN instead and takes no token from
        the others.

    Raises:
        TypeError: states or mask of another dtype.
        ValueError: states that are not `[S, B, T, D]`, a mask that does not fit, or an unknown estimator.
    """
    return _hsic_statistics("hsic_statistics", states, mask, estimator, selected)


def pairwise_hsic(
    states: Float[Tensor, "S B T D"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None = None,
    *,
    estimator: Estimator = "unbiased",
) -> Float64[Tensor, "G S S"]:
    """HSIC of every pair of states per group: `hsic_statistics(...).hsic`, which documents it."""
    return _hsic_statistics("pairwise_hsic", states, mask, estimator).hsic


def _hsic_statistics(
    name: str, states: Tensor, mask: Tensor | Groups | None, estimator: Estimator, selected: Tensor | None = None
) -> HsicStatistics:
    check_states(name, states)
    if estimator not in get_args(Estimator):
        raise ValueError(f'`{name}`: expected estimator="unbiased" or "biased", got {estimator!r}')
    token, member = _members(check_mask(name, states, mask, None if selected is None else selected.shape))
    if selected is not None:
        token = selected.flatten()[token]
    compute = reference.hsic_statistics
    if len(token) and use_triton(states):
        from repflow.triton_kernels import _hsic_kernels  # triton is not installed everywhere

        if len(states) <= _hsic_kernels.MAX_STATES:
            compute = _hsic_kernels.hsic_statistics
    return HsicStatistics(*compute(states, token, member, estimator, MIN_TOKENS[estimator]))


def _members(mask: Tensor | Groups) -> tuple[Tensor, Tensor]:
    """What `group_members` says of the groups of `mask`; where they are rows, without the groups: launches cost."""
    if isinstance(mask, Groups):
        return group_members(mask)
    if mask.dtype != torch.bool:
        return group_members(find_groups(mask))
    return torch.arange(mask.numel(), device=mask.device).view_as(mask), mask
