"""What was measured of a model on prompts, as it lies in its folder."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.extracted import Extraction
from repflow.monitor.offline.reproduce.work import known_json
from repflow.monitor.warning import warn

DONE, TOKEN_MAP, EXTRACTION = "measured.json", "token_map.npy", "extraction"


@dataclass(frozen=True, kw_only=True, eq=False)
class Depth:
    """What was measured of one model, task and length."""

    model: str
    task: str
    length: int
    """Tokens that were asked for."""
    folder: Path
    extraction: Extraction
    token_map: Float[np.ndarray, "blocks T"]
    """Adjacent cosine of every token of the first prompt."""
    choices: dict[str, Any]
    """Every choice, as plain values."""


@dataclass(eq=False)
class Depths:
    """All that was measured, and what could not be."""

    found: list[Depth] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """What was said of lengths beyond a model's window."""
    failed: dict[int, list[str]] = field(default_factory=dict)
    """What went wrong, by length."""

    def of(self, lengths: tuple[int, ...]) -> list[Depth]:
        """Those of some lengths."""
        return [depth for depth in self.found if depth.length in lengths]

    def check(self, lengths: tuple[int, ...]) -> None:
        """See that nothing went wrong at some lengths: what is incomplete must not pass for what was asked for.

        Raises:
            OfflineError: something did.
        """
        if wrong := [text for length in lengths for text in self.failed.get(length, [])]:
            raise OfflineError("; ".join(wrong))


def read_depth(folder: Path, model: str, task: str, length: int) -> Depth | None:
    """A measurement that is whole; None if it is to be made, or gone on with."""
    choices = known_json(folder / DONE)
    if choices is None:
        return None
    try:
        extraction = Extraction.open(folder / EXTRACTION)
    except OfflineError:
        return None  # what is damaged is told where it is read; the rest is gone on with
    try:
        token_map = np.load(folder / TOKEN_MAP, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        warn(f"{folder / TOKEN_MAP} is damaged ({type(error).__name__}); it is made again")
        return None
    return Depth(
        model=model,
        task=task,
        length=length,
        folder=folder,
        extraction=extraction,
        token_map=token_map,
        choices=choices,
    )


def tasks_by_model(depths: list[Depth]) -> Iterator[tuple[str, int, list[Depth]]]:
    """Model, length, and the measurements on each task."""
    for model, length in dict.fromkeys((depth.model, depth.length) for depth in depths):
        yield model, length, [depth for depth in depths if (depth.model, depth.length) == (model, length)]


def sample_counts(depths: list[Depth]) -> list[int]:
    """How many prompts were measured, from fewest to most."""
    return sorted({len(depth.extraction.labels) for depth in depths})
