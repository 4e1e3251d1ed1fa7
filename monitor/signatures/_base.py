"""What a failure signature is: a rule that reads a value of every state out of a snapshot, and a limit to it."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from repflow.monitor.alert import TITLE_CHARACTERS, Severity
from repflow.monitor.snapshot import BlockInfo, Snapshot


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a signature reads out of one snapshot, for each of the S states."""

    values: Float64[Tensor, " S"]
    """Held against the threshold; NaN where the signature has nothing to say."""
    threshold: Float64[Tensor, " S"] | None = None
    """What each is held against; that of the signature if None."""
    remember: Float64[Tensor, " S"] | None = None
    """What later readings are given as `past`."""


@dataclass(frozen=True, kw_only=True)
class Signature(ABC):
    """A failure signature: a named rule over snapshots.

    It is raised when the value of one and the same state is above its threshold in `patience` snapshots in a row, says
    so once, and can be raised again only after all values were at or below the release.

    Raises:
        TypeError: a number that is none, or a class without its texts.
        ValueError: a name, title, severity or number out of its range.
    """

    name: str
    """Under which it appears in loggers and run files: lower-case letters, digits and underscores."""
    severity: Severity
    """That of its alerts: `info`, `warning` or `error`."""
    patience: int
    """Snapshots in a row that must violate it. Unit: snapshots."""
    warmup_steps: int
    """Snapshots of earlier steps are not looked at. Unit: optimizer steps."""
    threshold: float
    """A value above it is a violation; in the unit of the values."""
    release: float
    """Once raised, it stays so until no value is above this; at most the threshold."""

    title: ClassVar[str]
    """What its alerts are called, in fewer than 64 characters."""
    reading: ClassVar[str]
    """What its values are, in words."""
    suggestion: ClassVar[str]
    """What to do about it, in words."""
    history: ClassVar[int] = 0
    """How many past snapshots `read` is given."""

    def __post_init__(self) -> None:
        self._check_texts()
        good = re.fullmatch("[a-z0-9_]+", self.name) is not None
        self.check("name", good, "of lower-case letters, digits and underscores")
        known = get_args(Severity)
        self.check("severity", self.severity in known, f"one of {', '.join(map(repr, known))}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(entry.default, int | float) and not isinstance(value, int | float):
                raise TypeError(f"`{type(self).__name__}`: expected {entry.name} to be a number, got {value!r}")
        self.check("patience", self.patience >= 1, "1 snapshot or more")
        self.check("warmup_steps", self.warmup_steps >= 0, "0 optimizer steps or more")
        self.check("threshold", math.isfinite(self.threshold), "a finite number")
        self.check("release", self.release <= self.threshold, f"at most the threshold {self.threshold:g}")

    def _check_texts(self) -> None:
        for text in ("title", "reading", "suggestion"):
            if not isinstance(getattr(self, text, None), str):
                raise TypeError(f"`{type(self).__name__}`: expected a class variable {text}, a text; it has none")
        if len(self.title) > TITLE_CHARACTERS:
            longest = f"a title of at most {TITLE_CHARACTERS} characters"
            raise ValueError(f"`{type(self).__name__}`: expected {longest}, got {self.title!r}")

    def check(self, field: str, good: bool, expected: str) -> None:
        """Refuse the value of a field.

        Raises:
            ValueError: it is not `good`.
        """
        if not good:
            got = getattr(self, field)
            raise ValueError(f"`{type(self).__name__}`: expected {field} to be {expected}, got {got!r}")

    @abstractmethod
    def read(self, snapshot: Snapshot, blocks: Sequence[BlockInfo], past: Float64[Tensor, "N S"]) -> Reading | None:
        """The values of a snapshot; None if it has nothing to say of this model or snapshot.

        Args:
            snapshot: what to look at.
            blocks: the blocks of the stream, in order.
            past: what the last readings remembered, oldest first, `history` at most.
        """

    def remark(self, states: Sequence[int]) -> str:
        """What else to say in the message of an alert that concerns some states; usually nothing."""
        return ""

    def show(self, value: float) -> str:
        """A value or threshold as text."""
        return f"{value:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain values."""
        return asdict(self)


def states_of(values: Float64[Tensor, " S"], states: Sequence[int]) -> Float64[Tensor, " S"]:
    """The values of some states, NaN for the others."""
    result = torch.full_like(values, torch.nan)
    result[list(states)] = values[list(states)]
    return result


def usual(past: Float64[Tensor, "N S"]) -> tuple[Float64[Tensor, " S"], Float64[Tensor, " S"]]:
    """Median of each state, and its standard deviation as the median absolute deviation estimates it; without NaN."""
    median = past.nanmedian(0).values
    return median, _MAD_TO_STD * (past - median).abs().nanmedian(0).values


_MAD_TO_STD = 1.4826
"""1/Φ⁻¹(3/4): makes the median absolute deviation of a normal distribution its standard deviation."""
