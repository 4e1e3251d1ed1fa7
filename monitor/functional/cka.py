"""Linear CKA: which layers have become copies of one another, up to rotation and scale?"""

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from repflow.triton_kernels import pairwise_hsic
from repflow.triton_kernels.hsic import Estimator


def cka_from_hsic(hsic: Float[Tensor, "*G S S"]) -> Float[Tensor, "*G S S"]:
    """CKA(a, b) = HSIC(a, b)/√(HSIC(a, a)·HSIC(b, b)); NaN where a self-HSIC is not positive (degenerate states)."""
    scale = hsic.diagonal(dim1=-2, dim2=-1).sqrt()
    denominator = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return torch.where(denominator > 0, hsic / denominator, torch.nan)


def layer_cka(
    states: Float[Tensor, "S B T D"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None = None,
    *,
    estimator: Estimator = "unbiased",
) -> Float64[Tensor, "G S S"]:
    """Linear CKA of every pair of states, with the tokens of a group as examples.

    CKA(a, b) = HSIC(a, b)/√(HSIC(a, a)·HSIC(b, b)) (Kornblith et al. 2019; arXiv 2510.06640, section 3.3.1).
    1 says that two states hold the same geometry up to rotation, scale and shift. HSIC grows with the fourth power of a
    token's norm,
    so that one very large token can decide the value: `repflow.triton_kernels.hsic_statistics` tells its share.

    Args:
        states: h^(0) … h^(L) of B rows of T tokens.
        mask: attention mask (one group per row) or document numbers (one group per document, in row-major order); 0 is
            padding.
        estimator: "unbiased" (values in [−1, 1], strongly negative ones are possible for few tokens) or "biased" (in
            [0, 1], too high
            for few tokens). The two differ by more than noise.

    Returns:
        float64; NaN for a group with too few tokens (4 unbiased, 2 biased) and for a state whose tokens are all equal
        or all non-finite.

    Raises:
        TypeError: states or mask of another dtype.
        ValueError: states that are not `[S, B, T, D]`, a mask that does not fit, or an unknown estimator.
    """
    return cka_from_hsic(pairwise_hsic(states, mask, estimator=estimator))
