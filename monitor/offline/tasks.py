"""What tasks share: prompts that hide one gold item among others, at positions that are controlled and balanced."""

import hashlib
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from repflow.monitor.offline import OfflineError

TESTED_POSITIONS = 11
"""Positions that are tested unless chosen otherwise, as in the probe code that the paper builds on."""


@dataclass(frozen=True)
class Sample:
    """One prompt, and what a probe is to read from it."""

    prompt: str
    answer: str
    """What the prompt asks for."""
    position: int
    """Of the gold item among the items, from 0."""
    label: int
    """The same as a class: the number of the tested position."""
    context: int
    """Samples of equal number share their gold item: they belong on the same side of a split."""


@dataclass(frozen=True, kw_only=True)
class AbstractTask(ABC):
    """Samples by number: sample i of a task is always the same one, however many are drawn.

    Any run of C samples that begins at a multiple of C has the gold item once at each of the C tested positions.

    Raises:
        OfflineError: a number out of its range.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    """What the items are, in the plural."""

    items: int
    """Items of one prompt, m."""
    seed: int = 0
    classes: int | None = None
    """Tested positions C; min(11, m) if None."""
    crossed: bool = False
    """Show the same items C times, once with the gold item at each position, instead of fresh ones in every sample."""

    def __post_init__(self) -> None:
        if self.items < 2:
            raise OfflineError(f"{self.name}: expected 2 {self.unit} or more to find one among, got {self.items}")
        if self.classes is not None and not 2 <= self.classes <= self.items:
            raise OfflineError(
                f"{self.name}: expected from 2 to {self.items} tested positions, one for each of the {self.unit} at "
                f"most; got {self.classes}"
            )

    @property
    def positions(self) -> tuple[int, ...]:
        """The tested positions, evenly spaced from the first item to the last."""
        steps = (self.classes or min(TESTED_POSITIONS, self.items)) - 1
        return tuple((2 * step * (self.items - 1) + steps) // (2 * steps) for step in range(steps + 1))

    def sample(self, index: int, attempt: int = 0) -> Sample:
        """Sample number `index`; another `attempt` gives other items around the same gold position."""
        block, place = divmod(index, len(self.positions))
        order = list(range(len(self.positions)))
        generator(self.name, "labels", self.seed, block).shuffle(order)
        label = order[place]
        context = block if self.crossed else index
        prompt, answer, group = self._compose(context, self.positions[label], attempt)
        return Sample(prompt, answer, self.positions[label], label, group)

    def describe(self) -> dict[str, Any]:
        """Every choice, as plain values."""
        return {
            "task": self.name,
            "items": self.items,
            "seed": self.seed,
            "positions": list(self.positions),
            "label": "number of the tested gold position",
            "crossed": self.crossed,
        }

    @abstractmethod
    def _compose(self, context: int, position: int, attempt: int) -> tuple[str, str, int]:
        """Prompt, answer and group of a context with its gold item at `position`."""


def generator(*key: object) -> random.Random:
    """A random generator of its own for every key, the same on every platform and independent of all others."""
    return random.Random(hashlib.blake2b(repr(key).encode(), digest_size=16).digest())
