"""What the public functions accept.

Letters of this package: S states, B rows of the batch, T tokens of a row, D features, G groups.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from repflow.triton_kernels.groups import Groups, find_groups

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_states(name: str, states: Float[Tensor, "S B T D"], minimum: int = 1) -> None:
    """Raise unless `states` is a floating tensor `[S, B, T, D]`, S ≥ `minimum`; `name` is the caller's."""
    if not isinstance(states, Tensor):
        raise TypeError(
            f"`{name}`: expected one tensor of states [S, B, T, D], got {type(states).__name__}; "
            "stack the states of all layers with torch.stack"
        )
    if states.dtype not in _FLOATS:
        raise TypeError(f"`{name}`: expected states in float16, bfloat16, float32 or float64, got {states.dtype}")
    if states.ndim != 4:
        raise ValueError(f"`{name}`: expected states of shape [S, B, T, D], got {tuple(states.shape)}")
    if states.shape[0] < minimum:
        raise ValueError(
            f"`{name}`: expected at least {minimum} states (the input of the first block and the output of every one), "
            f"got {states.shape[0]}"
        )
    if states.shape[3] == 0:
        raise ValueError(f"`{name}`: expected at least one feature, got shape {tuple(states.shape)}")


def check_mask(
    name: str,
    states: Float[Tensor, "S B T D"],
    mask: Bool[Tensor, "R K"] | Int[Tensor, "R K"] | Groups | None,
    shape: Sequence[int] | None = None,
) -> Bool[Tensor, "R K"] | Int[Tensor, "R K"] | Groups:
    """`mask`, or one that keeps every token if there is none.

    Raises unless it fits the states, or the `shape` of what is selected of them; `name` is the caller's.
    """
    wanted = list(states.shape[1:3] if shape is None else shape)
    if mask is None:
        return torch.ones(wanted, dtype=torch.bool, device=states.device)
    if isinstance(mask, Groups):
        check_mask(name, states, mask.valid, shape)
        return mask
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"`{name}`: expected a boolean or integer mask (0 is padding, k is document k of its row), got {got}"
        )
    if list(mask.shape) != wanted:
        what = f"[B, T] = {wanted} as in states {list(states.shape)}" if shape is None else f"{wanted} as in `selected`"
        raise ValueError(f"`{name}`: expected a mask of shape {what}, got {list(mask.shape)}")
    if mask.device != states.device:
        raise ValueError(f"`{name}`: states are on {states.device} and the mask on {mask.device}; move the mask there")
    if mask.dtype.is_signed and mask.numel() and int(mask.min()) < 0:
        raise ValueError(f"`{name}`: expected document numbers from 0 (padding) up, got {int(mask.min())}")
    return mask


def groups_of(
    name: str, states: Float[Tensor, "S B T D"], mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | Groups | None
) -> Groups:
    """The groups of a mask that `check_mask` accepts."""
    mask = check_mask(name, states, mask)
    return mask if isinstance(mask, Groups) else find_groups(mask)
