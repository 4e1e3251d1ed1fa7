"""How strong the regularizer's term is: fixed, scheduled over steps, or driven by what it does."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DualAscent:
    """λ of each layer follows its similarity, and rests while that is in the band [target − band, target].

    After each optimizer step, λ ← min(maximum, max(0, λ + step_size · d)), where d is how far the similarity is above
    the band, or below it with a minus: gradient ascent on the multiplier of "similarity ≤ target".

    Raises:
        ValueError: a number out of its range.
    """

    step_size: float = 0.01
    """What an excess of 1 adds to λ in a step; above 0."""
    maximum: float = 1.0
    """λ goes no higher: if the similarity stays above the target, the loss matters more to the model."""
    band: float = 0.05
    """Width of the band below the target; at least 0."""
    start: float = 0.0
    """λ before the first step."""

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("step_size", self.step_size, self.step_size > 0),
            ("maximum", self.maximum, self.maximum > 0),
            ("band", self.band, self.band >= 0),
            ("start", self.start, 0 <= self.start <= self.maximum),
        ):
            if not (fits and math.isfinite(value)):
                expected = {"band": "at least 0", "start": "from 0 to the maximum"}.get(name, "above 0")
                raise ValueError(f"`DualAscent`: expected a finite {name}, {expected}, got {value}")

    def update(
        self, strength: Float64[Tensor, " L"], similarity: Float64[Tensor, " L"], target: float
    ) -> Float64[Tensor, " L"]:
        """λ of each layer after a step; as before where the similarity is NaN. Waits for no device."""
        above, below = (similarity - target).clamp(min=0), (target - self.band - similarity).clamp(min=0)
        moved = (strength + self.step_size * (above - below)).clamp(0, self.maximum)
        return torch.where(similarity.isnan(), strength, moved)


Strength = float | Callable[[int], float] | DualAscent
"""λ: a number, a function of the optimizer step from 0, or a controller."""


def checked_strength(owner: str, strength: Strength) -> Strength:
    """The same, if it is one.

    Raises:
        TypeError: something else.
        ValueError: a negative or infinite number.
    """
    if isinstance(strength, DualAscent) or callable(strength):
        return strength
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise TypeError(
            f"`{owner}`: expected strength as a number, a function of the step, or a DualAscent, "
            f"got {type(strength).__name__}"
        )
    return checked_number(owner, strength)


def checked_number(owner: str, strength: float) -> float:
    """λ, if it is finite and at least 0.

    Raises:
        ValueError: it is not.
    """
    value = float(strength)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{owner}`: expected a finite strength of at least 0, got {strength}")
    return value
