"""`Alert`: what a failure signature says once it has been seen."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Severity = Literal["info", "warning", "error"]
"""`info`: worth knowing when reading the curves; `warning`: look at it; `error`: the run is most likely lost."""

TITLE_CHARACTERS = 63
"""The most that W&B takes for the title of an alert."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A failure signature that was raised, with the numbers behind it.

    Raises:
        ValueError: an unknown severity, or a title that is too long.
    """

    step: int
    """Optimizer step of the snapshot that raised it."""
    signature: str
    """Name of the signature, such as `early_oversmoothing`."""
    severity: Severity
    """How bad it is."""
    title: str
    """What was seen, in fewer than 64 characters."""
    message: str
    """The same with numbers and layers."""
    suggestion: str
    """What to do about it."""
    states: tuple[int, ...]
    """The states concerned, ascending; state l + 1 is the output of block l, state 0 the input of block 0."""
    value: float
    """The value that is furthest beyond its threshold."""
    threshold: float
    """What it was held against."""

    def __post_init__(self) -> None:
        if self.severity not in get_args(Severity):
            known = ", ".join(map(repr, get_args(Severity)))
            raise ValueError(f"`Alert`: expected a severity among {known}, got {self.severity!r}")
        if len(self.title) > TITLE_CHARACTERS:
            raise ValueError(
                f"`Alert`: expected a title of at most {TITLE_CHARACTERS} characters, got {len(self.title)}: "
                f"{self.title!r}; say the rest in the message"
            )

    def __str__(self) -> str:
        """All of it in one line."""
        return f"{self.severity} at step {self.step}: {self.title}. {self.message}. {self.suggestion}"

    def to_dict(self) -> dict[str, Any]:
        """Every field, the states as a list."""
        return asdict(self) | {"states": list(self.states)}
