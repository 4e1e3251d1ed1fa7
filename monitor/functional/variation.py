"""V_loc and V_glob: how unevenly, and how much, the residual stream changes over depth."""

from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from repflow.triton_kernels import depth_statistics


def layer_local_variance(
    states: Float[Tensor, "S B T D"], mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None = None
) -> Float64[Tensor, ""]:
    """V_loc: mean of |h^(l+1) − (h^(l) + h^(l+2))/2| over tokens, features and interior states.

    arXiv 2510.06640, Eq. 3, with its misprint h^(t+1) read as h^(l+1).
    0 says that the stream moves in equal steps. It has the scale of the states. All (token, interior state) pairs weigh
    the same; one that touches a non-finite state is left out. The mean is over the S − 2 second differences that exist.

    Args:
        states: h^(0) … h^(L) of B rows of T tokens.
        mask: attention mask or document numbers; 0 is padding.

    Returns:
        0-d, float64, in the unit of the states; NaN with fewer than three states or without a valid token.

    Raises:
        TypeError: states or mask of another dtype.
        ValueError: states that are not `[S, B, T, D]`, fewer than two of them, or a mask that does not fit.
    """
    return depth_statistics(states, mask).curvature.double().nanmean()


def layer_global_variance(
    states: Float[Tensor, "S B T D"], mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None = None
) -> Float64[Tensor, ""]:
    """V_glob: mean over tokens and features of the population standard deviation over all S states.

    arXiv 2510.06640, Eq. 4.
    It has the scale of the states. Tokens weigh the same; one with a non-finite state is left out.

    Args:
        states: h^(0) … h^(L) of B rows of T tokens.
        mask: attention mask or document numbers; 0 is padding.

    Returns:
        0-d, float64, in the unit of the states; NaN without a valid token.

    Raises:
        TypeError: states or mask of another dtype.
        ValueError: states that are not `[S, B, T, D]`, fewer than two of them, or a mask that does not fit.
    """
    return depth_statistics(states, mask).spread.double().nanmean()
