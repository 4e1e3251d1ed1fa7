"""What a demo trains, for how long, and where it writes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repflow.monitor.demo import DemoError
from repflow.monitor.demo.models import RECIPES, DemoModel, Recipe, choose_models

SNAPSHOTS = 20
"""Snapshots of a run at most, unless chosen otherwise."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What a demo trains, for how long, and where it writes.

    Raises:
        DemoError: a number out of its range, nothing to train, or a `folder` that is a file.
    """

    models: Sequence[DemoModel]
    """What to train, one after another."""
    recipe: Recipe
    """How: shape of a batch, and the learning rate."""
    steps: int
    """Optimizer steps per model."""
    every_n_steps: int
    """Steps between snapshots."""
    seed: int = 0
    """Seeds weights and the order of the text."""
    text: Path | None = None
    """A file or folder to learn from; the source of Python's standard library if None."""
    folder: Path = field(default_factory=lambda: Path("repflow-demo"))
    """Where run files, W&B runs and the report go."""

    def __post_init__(self) -> None:
        if not self.models:
            raise DemoError("`Demo`: expected at least one model")
        if self.steps < 1:
            raise DemoError(f"--steps: expected 1 optimizer step or more, got {self.steps}")
        if self.every_n_steps < 1:
            raise DemoError(f"--every: expected 1 optimizer step or more between snapshots, got {self.every_n_steps}")
        if not 0 <= self.seed < 2**32:
            raise DemoError(f"--seed: expected a number from 0 to 2³²−1, got {self.seed}")
        if self.folder.exists() and not self.folder.is_dir():
            raise DemoError(f"--out: expected a folder, and {self.folder} is a file")

    @classmethod
    def of_size(
        cls,
        size: str | None = None,
        *,
        models: Sequence[str] = (),
        quick: bool = False,
        steps: int | None = None,
        every_n_steps: int | None = None,
        **fields: Any,
    ) -> "Demo":
        """A demo with the models of the table.

        Args:
            size: `small`, `medium` or `large`; if None `small` without a GPU and `medium` with one.
            models: names of models; all of the size if empty.
            quick: take the short training of the size.
            steps: those of the size if None.
            every_n_steps: such that there are at most 20 snapshots if None.
            fields: the other fields: `seed`, `text`, `folder`.

        Raises:
            DemoError: as the class does; an unknown size or model.
        """
        size = _default_size() if size is None else size
        chosen, recipe = choose_models(models, size), RECIPES[size]
        if steps is None:
            steps = recipe.quick_steps if quick else recipe.steps
        if every_n_steps is None:
            every_n_steps = math.ceil(steps / SNAPSHOTS)
        return cls(models=chosen, recipe=recipe, steps=steps, every_n_steps=every_n_steps, **fields)

    def run_file(self, model: DemoModel) -> Path:
        """Where the run of a model is stored."""
        return self.folder / f"{model.name}.db"


def _default_size() -> str:
    import torch

    return "medium" if torch.cuda.is_available() else "small"
