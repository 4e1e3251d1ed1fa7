"""The gradient of inter-token similarity, from sums of unit vectors: two reads of the state, and never n×n."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from repflow.triton_kernels import reference
from repflow.triton_kernels._dispatch import use_triton
from repflow.triton_kernels._inputs import check_mask, check_states, groups_of
from repflow.triton_kernels.groups import Groups, find_groups


class SimilarityGradient(NamedTuple):
    """The gradient of weight · max(0, similarity − target), with what it was found from."""

    gradient: Float[Tensor, "B T D"]
    """`onto`, if there is one, and the gradient; in the dtype of the state."""
    similarity: Float64[Tensor, ""]
    """Mean over the groups of two tokens and more; NaN without any."""
    onto_square: Float64[Tensor, ""]
    """‖onto‖²; 0 without. Kernels square in float32."""
    added_square: Float64[Tensor, ""]
    """‖what was added‖²."""


def similarity_gradient(
    state: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | Groups | None = None,
    *,
    weight: Float[Tensor, ""] | float = 1.0,
    target: float | None = None,
    onto: Float[Tensor, "B T D"] | None = None,
) -> SimilarityGradient:
    """Gradient of the inter-token similarity of one state (arXiv 2510.06640, Eq. 2) with respect to the state.

    The similarity of a group of n tokens with unit vectors u_t is (‖s‖² − n)/(n(n − 1)), s = Σ_t u_t, and its gradient
    with respect to h_t is 2/(n(n − 1)) · (I − u_t u_tᵀ)s/‖h_t‖. Of the mean over G groups it is the G-th part. Groups
    of less than two tokens have no similarity, and count for nothing. Padding, zero vectors and tokens that are not
    finite have no direction, and no gradient.

    Args:
        state: h^(l) in float16, bfloat16, float32 or float64.
        mask: attention mask (one group per row) or document numbers (one group per document); 0 is padding. Or what
            `find_groups` makes of it, with which a GPU is not waited for.
        weight: what the gradient is multiplied with; a tensor stays on its device.
        target: no gradient unless the similarity is above it; None: always.
        onto: a gradient of the same shape and dtype, to which this one is added.

    Raises:
        TypeError: state or mask of another dtype, or `onto` of another one than the state.
        ValueError: a state that is not `[B, T, D]`, or a mask or `onto` that does not fit.
    """
    _check(state, onto)
    check_states("similarity_gradient", states := state.unsqueeze(0))
    if isinstance(weight, Tensor):
        weight = weight.to(state.device, torch.float64)
    else:
        weight = torch.full((), weight, dtype=torch.float64, device=state.device)  # written there: nothing is copied
    if onto is not None and onto.stride(-1) != 1:
        onto = onto.contiguous()  # as what a sum passes back: one number for all
    if use_triton(states):
        from repflow.triton_kernels import _similarity

        if mask is not None:
            mask = check_mask("similarity_gradient", states, mask)
            mask = find_groups(mask) if isinstance(mask, Tensor) and mask.dtype != torch.bool else mask
        return SimilarityGradient(*_similarity.similarity_gradient(state, mask, weight, target, onto))
    groups = groups_of("similarity_gradient", states, mask)
    return SimilarityGradient(*reference.similarity_gradient(state, groups, weight, target, onto))


def _check(state: Tensor, onto: Tensor | None) -> None:
    if isinstance(state, Tensor) and state.ndim != 3:
        raise ValueError(f"`similarity_gradient`: expected one state of shape [B, T, D], got {tuple(state.shape)}")
    if onto is None:
        return
    if onto.dtype != state.dtype:
        raise TypeError(f"`similarity_gradient`: expected `onto` in {state.dtype} like the state, got {onto.dtype}")
    if onto.shape != state.shape or onto.device != state.device:
        raise ValueError(
            f"`similarity_gradient`: expected `onto` of shape {tuple(state.shape)} on {state.device} like the state, "
            f"got {tuple(onto.shape)} on {onto.device}"
        )
