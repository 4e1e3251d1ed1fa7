"""Adjacent-layer similarity: how far does each block turn a token?"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from repflow.triton_kernels import depth_statistics


def adjacent_layer_similarity(
    states: Float[Tensor, "S B T D"], mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None = None
) -> Float[Tensor, "S-1 B T"]:
    """cos(h^(l), h^(l+1)) of every token and block (arXiv 2510.06640, section 3.2.1).

    1 says that the block leaves the token's direction as it was, 0 that nothing of it is left.

    Args:
        states: h^(0) … h^(L), S = L + 1 ≥ 2, of B rows of T tokens.
        mask: attention mask or document numbers; 0 is padding.

    Returns:
        In [−1, 1], float32 (float64 for float64 states); NaN at padding, and where one of the two states is non-finite
        or the zero vector.

    Raises:
        TypeError: states or mask of another dtype.
        ValueError: states that are not `[S, B, T, D]`, fewer than two of them, or a mask that does not fit.
    """
    return depth_statistics(states, mask).adjacent_cosine
