"""Along depth, for every token: its norms, how far each block turns and bends its path, and how it spreads."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from repflow.triton_kernels import reference
from repflow.triton_kernels._dispatch import use_triton
from repflow.triton_kernels._inputs import check_mask, check_states, groups_of
from repflow.triton_kernels.groups import Groups


class DepthStatistics(NamedTuple):
    """Statistics of each token along depth.

    Maps are NaN at padding and wherever a state that they touch is non-finite.
    """

    norm: Float[Tensor, "S B T"]
    """‖h^(l)‖₂."""
    adjacent_cosine: Float[Tensor, "S-1 B T"]
    """cos(h^(l), h^(l+1)); NaN where one of the two is the zero vector."""
    adjacent_distance: Float[Tensor, "S-1 B T"]
    """½‖u^(l) − u^(l+1)‖² = 1 − cos of the unit vectors u, exact also where 1 − cos would cancel."""
    curvature: Float[Tensor, "S-2 B T"]
    """Mean over features of |h^(l+1) − (h^(l) + h^(l+2))/2|; its mean is V_loc (Eq. 3)."""
    spread: Float[Tensor, "B T"]
    """Mean over features of the population std over the states; its mean is V_glob (Eq. 4)."""
    nonfinite: Int64[Tensor, " S"]
    """Valid tokens with a NaN or an infinity."""
    zero: Int64[Tensor, " S"]
    """Valid tokens that are the zero vector."""


def depth_statistics(
    states: Float[Tensor, "S B T D"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | Groups | None = None,
) -> DepthStatistics:
    """Everything that repflow measures along depth (arXiv 2510.06640, section 3.2.1, Eq. 3 and 4).

    Args:
        states: h^(0) … h^(L) of B rows of T tokens, S = L + 1 ≥ 2, in float16, bfloat16, float32 or float64.
        mask: attention mask or document numbers; 0 is padding. Or what `find_groups` makes of it, told once for several
            functions. None: every token is valid.

    Returns:
        Maps in float32 (float64 for float64 states), counts in int64. Computed in float64; on a GPU states other than
        float64 are subtracted and summed in float32, in float64 where that would not do. What is left is an error of
        2⁻²² of the token's largest feature in `curvature` and `spread` of float32 states.

    Raises:
        TypeError: states or mask of another dtype.
        ValueError: states that are not `[S, B, T, D]`, fewer than two of them, or a mask that does not fit.
    """
    check_states("depth_statistics", states, minimum=2)
    if use_triton(states):
        from repflow.triton_kernels._stream import stream

        if mask is not None:
            check_mask("depth_statistics", states, mask)
        return DepthStatistics(*stream(states, mask, depth=True, sums=False)[0])
    return DepthStatistics(*reference.depth_statistics(states, groups_of("depth_statistics", states, mask)))
