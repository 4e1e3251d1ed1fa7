"""Inter-token similarity: do the tokens of a sequence keep their identity, or collapse onto each other?"""

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from repflow.triton_kernels import token_sums


def mean_pair_cosine(length: Float64[Tensor, "S G"], count: Int64[Tensor, "S G"]) -> Float64[Tensor, "S G"]:
    """Mean cosine over the pairs i < j of n vectors, from ‖s‖, s = Σ_t u_t: (‖s‖² − n)/(n(n − 1)); NaN when n < 2."""
    n = count.double()
    similarity = (length.square() - n) / (n * (n - 1))
    return similarity.masked_fill(count < 2, torch.nan)


def inter_token_similarity(
    states: Float[Tensor, "S B T D"], mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None = None
) -> Float64[Tensor, "S G"]:
    """Mean cosine over all pairs of tokens of a group, per state (arXiv 2510.06640, Eq. 2).

    1 says that all tokens point the same way (oversmoothing), 0 that they are unrelated. Computed from the sum of unit
    vectors, never from n×n products. Tokens without a direction (non-finite, or the zero vector) are left out of the
    state where they have none.

    Args:
        states: h^(0) … h^(L) of B rows of T tokens.
        mask: attention mask (one group per row) or document numbers (one group per document, in row-major order); 0 is
            padding.

    Returns:
        In [−1, 1], float64; NaN for a group with fewer than two tokens.

    Raises:
        TypeError: states or mask of another dtype.
        ValueError: states that are not `[S, B, T, D]`, or a mask that does not fit.
    """
    sums = token_sums(states, mask)
    return mean_pair_cosine(torch.linalg.vector_norm(sums.unit_sum, dim=-1), sums.count)
