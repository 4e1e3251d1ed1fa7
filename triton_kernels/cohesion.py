"""Across the tokens of a group: sums of unit vectors, from which every mean cosine over pairs follows."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from repflow.triton_kernels import reference
from repflow.triton_kernels._dispatch import use_triton
from repflow.triton_kernels._inputs import check_mask, check_states, groups_of
from repflow.triton_kernels.depth import DepthStatistics, depth_statistics
from repflow.triton_kernels.groups import Groups


class TokenSums(NamedTuple):
    """Sums of unit vectors per state and group.

    With s = Σ_t u_t over n tokens, the mean cosine over pairs is (‖s‖² − n)/(n(n − 1)).
    """

    unit_sum: Float64[Tensor, "S G D"]
    """Σ_t h_t/‖h_t‖ over the tokens of the group that have a direction at this state."""
    count: Int64[Tensor, "S G"]  # pyright: ignore[reportIncompatibleMethodOverride]
    """How many tokens those are: valid, finite, not the zero vector."""
    update_unit_sum: Float64[Tensor, "S-1 G D"]
    """The same of the updates Δh^(l) = h^(l+1) − h^(l)."""
    update_count: Int64[Tensor, "S-1 G"]
    """How many tokens have an update with a direction."""


def token_sums(
    states: Float[Tensor, "S B T D"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | Groups | None = None,
) -> TokenSums:
    """Sums of the unit vectors of h^(l) and of Δh^(l) over each group (arXiv 2510.06640, Eq. 2, without n×n products).

    Args:
        states: h^(0) … h^(L), S = L + 1 ≥ 1, in float16, bfloat16, float32 or float64.
        mask: attention mask (one group per row) or document numbers (one group per document); 0 is padding. Or what
            `find_groups` makes of it.

    Returns:
        Sums in float64, counts in int64.

    Raises:
        TypeError: states or mask of another dtype.
        ValueError: states that are not `[S, B, T, D]`, or a mask that does not fit.
    """
    check_states("token_sums", states)
    if use_triton(states):
        from repflow.triton_kernels._stream import stream

        if mask is not None:
            check_mask("token_sums", states, mask)
        return TokenSums(*stream(states, mask, depth=False, sums=True)[1])
    return TokenSums(*reference.token_sums(states, groups_of("token_sums", states, mask)))


def depth_and_token_sums(
    states: Float[Tensor, "S B T D"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | Groups | None = None,
) -> tuple[DepthStatistics, TokenSums]:
    """`depth_statistics` and `token_sums` of the same states, which share the lengths on a GPU: one read less."""
    check_states("depth_and_token_sums", states, minimum=2)
    if not use_triton(states):
        return depth_statistics(states, mask), token_sums(states, mask)
    from repflow.triton_kernels._stream import stream

    if mask is not None:
        check_mask("depth_and_token_sums", states, mask)
    maps, sums = stream(states, mask, depth=True, sums=True)
    return DepthStatistics(*maps), TokenSums(*sums)
