"""How strong the regularizer's term is: fixed, scheduled over steps, or driven by what it does."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DualAscent:
    """λ of each layer follows its similarity, and rests while that is in the band [target − band, target].

    After each optimizer step, λ ← min(maximum, max(0, λ + step_size · d)), where d is how far the similarity is above
    the band, or below it with a minus: gradient ascent on the multiplier of "similarity ≤ target".

    The contrastive term acts on pairs of tokens, and is above 0 while some of them are above the target. There λ
    follows the value of the term: d = value − band, gradient ascent on the multiplier of "value ≤ band".

    Raises:
        ValueError: a number out of its range.
    """

    step_size: float = 0.01
    """What an excess of 1 adds to λ in a step; above 0."""
    maximum: float = 1.0
    """λ goes no higher: if the similarity stays above the target, the loss matters more to the model."""
    band: float = 0.05
    """Width of the band below the target; the value that a contrastive term may have. At least 0."""
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

    def limits(self, target: float, term: str) -> tuple[float, float]:
        """Between which λ rests: the similarity, or the value of the contrastive term."""
        return (target - self.band, target) if term == "similarity" else (self.band, self.band)

    def update(
        self, strength: Float64[Tensor, " L"], measured: Float64[Tensor, " L"], low: float, high: float
    ) -> Float64[Tensor, " L"]:
        """λ of each layer after a step that measured it outside of [low, high]; as before where that is NaN.

        Waits for no device.
        """
        above, below = (measured - high).clamp(min=0), (low - measured).clamp(min=0)
        moved = (strength + self.step_size * (above - below)).clamp(0, self.maximum)
        return torch.where(measured.isnan(), strength, moved)


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
    if isinstance(strength, bool) or not isinstance(strength, Real):
        raise TypeError(
            f"`{owner}`: expected strength as a number, a function of the step, or a DualAscent, "
            f"got {type(strength).__name__}"
        )
    return checked_number(owner, float(strength))


def checked_number(owner: str, strength: float) -> float:
    """λ, if it is finite and at least 0.

    Raises:
        ValueError: it is not.
    """
    value = float(strength)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{owner}`: expected a finite strength of at least 0, got {strength}")
    return value


class Multipliers:
    """λ of each layer from step to step, on the device.

    Args:
        strength: what drives it.
        layers: their numbers.
        limits: between which it rests under a `DualAscent`: of the similarity, or of a term's value.
        device: of λ.
    """

    def __init__(
        self, strength: Strength, layers: tuple[int, ...], limits: tuple[float, float], device: torch.device
    ) -> None:
        self.layers, self.step = layers, 0
        self._strength, self._limits = strength, limits
        self.values = torch.full((len(layers),), self._begin(), dtype=torch.float64, device=device)

    def move(self, measured: Float64[Tensor, " L"]) -> None:
        """An optimizer step has ended. Waits for no device."""
        self.step += 1
        if isinstance(self._strength, DualAscent):
            self.values = self._strength.update(self.values, measured, *self._limits)
        elif callable(self._strength):
            self.values = torch.full_like(self.values, self._begin())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain values."""
        return {"step": self.step, "layers": list(self.layers), "strength": self.values.tolist()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. A fixed or scheduled strength is the one that was given.

        Raises:
            ValueError: it is of other layers.
        """
        if list(state_dict["layers"]) != list(self.layers):
            raise ValueError(
                f"`RepresentationRegularizer`: expected the state of layers {list(self.layers)}, got that of "
                f"{list(state_dict['layers'])}; resume with the layers that the run began with"
            )
        self.step = int(state_dict["step"])
        if isinstance(self._strength, DualAscent):
            self.values = self.values.new_tensor(state_dict["strength"]).clamp(0, self._strength.maximum)
        else:
            self.values = torch.full_like(self.values, self._begin())

    def _begin(self) -> float:
        """λ of the step that begins, where it does not depend on what was measured."""
        if isinstance(self._strength, DualAscent):
            return self._strength.start
        if callable(self._strength):
            return checked_number("RepresentationRegularizer", self._strength(self.step))
        return float(self._strength)
