"""A demo from its options to the table and the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from repflow._imports import require
from repflow.monitor.demo.models import RECIPES, DemoModel, Recipe, choose_models

if TYPE_CHECKING:
    from repflow.monitor.demo.training import Outcome, Plan

SNAPSHOTS = 20
"""Snapshots of a run at most, unless chosen otherwise."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What a demo trains, for how long, and where it writes.

    Raises:
        ValueError: a number out of its range, nothing to train, or a `folder` that is a file.
    """

    models: Sequence[DemoModel]
    """What to train, one after another."""
    recipe: Recipe
    """How."""
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
            raise ValueError("`Demo`: expected at least one model")
        if self.steps < 1:
            raise ValueError(f"--steps: expected 1 optimizer step or more, got {self.steps}")
        if self.every_n_steps < 1:
            raise ValueError(f"--every: expected 1 optimizer step or more between snapshots, got {self.every_n_steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed: expected a number from 0 to 2³²−1, got {self.seed}")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out: expected a folder, and {self.folder} is a file")

    @classmethod
    def of_size(
        cls,
        size: str | None = None,
        *,
        models: Sequence[str] = (),
        steps: int | None = None,
        quick: bool = False,
        every_n_steps: int | None = None,
        seed: int = 0,
        text: Path | None = None,
        folder: Path = Path("repflow-demo"),
    ) -> "Demo":
        """A demo with the models of the table.

        Args:
            size: `small`, `medium` or `large`; if None `small` without a GPU and `medium` with one.
            models: names of models; all of the size if empty.
            steps: those of the size if None.
            quick: take the short training of the size.
            every_n_steps: such that there are at most 20 snapshots if None.
            seed: see the field.
            text: see the field.
            folder: see the field.

        Raises:
            ValueError: as the class does; an unknown size or model.
        """
        size = size or _default_size()
        chosen = choose_models(models, size)
        recipe = RECIPES[size]
        if steps is None:
            steps = recipe.quick_steps if quick else recipe.steps
        if every_n_steps is None:
            every_n_steps = math.ceil(steps / SNAPSHOTS)
        return cls(
            models=chosen,
            recipe=recipe,
            steps=steps,
            every_n_steps=every_n_steps,
            seed=seed,
            text=text,
            folder=folder,
        )


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What came of a demo."""

    outcomes: Sequence["Outcome"]
    """One for each model that was started."""
    report: Path | None
    """The page, if there was anything to show."""

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 1 if a model failed, else 0."""
        if any(outcome.interrupted for outcome in self.outcomes):
            return 130
        return int(any(outcome.error for outcome in self.outcomes))


def run_demo(demo: Demo, console: Console | None = None) -> DemoResult:
    """Train the models, show the table, write the report.

    A model that fails does not keep the others from running. Ctrl-C ends the training under way, and what is there is
    shown.

    Raises:
        ModuleNotFoundError: Lightning, transformers or plotly is missing.
        ValueError: the text cannot be trained on, or a run file in the folder is none.
        OSError: the folder cannot be written to.
    """
    console = console or Console()
    require("lightning")
    require("transformers")
    require("plotly")
    with console.status("loading text, torch, lightning and transformers …"):
        from repflow.monitor.demo.text import load_corpus

        corpus = load_corpus(demo.text, sequence=demo.recipe.sequence, batch=demo.recipe.batch)
        from repflow.monitor.demo.training import Plan, device_name, train

    plan = Plan(
        recipe=demo.recipe, steps=demo.steps, every_n_steps=demo.every_n_steps, seed=demo.seed, folder=demo.folder
    )
    _prepare(plan, demo.models)
    names = ", ".join(model.name for model in demo.models)
    console.print(
        f"{names}: {demo.steps} steps of {plan.recipe.batch} × {plan.recipe.sequence} bytes each, on {device_name()}, "
        f"from {escape(corpus.source)} ({len(corpus.train):,} bytes); a snapshot every {demo.every_n_steps} steps"
    )
    outcomes: list[Outcome] = []
    for model in demo.models:
        outcomes.append(train(model, plan, corpus, console))
        if outcomes[-1].interrupted:
            console.print("interrupted: showing what is there", style="yellow")
            break
    return DemoResult(outcomes=outcomes, report=_show(outcomes, plan, console))


def _default_size() -> str:
    import torch

    return "medium" if torch.cuda.is_available() else "small"


def _prepare(plan: "Plan", models: Sequence[DemoModel]) -> None:
    """Make the folder, and find out now, not after training, whether a file in it is in the way."""
    from repflow.monitor.demo.training import run_file
    from repflow.monitor.sinks import open_run

    plan.folder.mkdir(parents=True, exist_ok=True)
    for model in models:
        if (path := run_file(plan, model)).exists():
            open_run(path)


def _show(outcomes: Sequence["Outcome"], plan: "Plan", console: Console) -> Path | None:
    from repflow.monitor.demo.summary import show_paths, show_table, summarise
    from repflow.monitor.report import write_report

    summaries = [summarise(outcome.run_file) for outcome in outcomes]
    runs = [outcome.run_file for outcome, summary in zip(outcomes, summaries, strict=True) if summary]
    show_table(console, outcomes, summaries)
    report = write_report(runs, plan.folder / "report.html") if runs else None
    show_paths(console, outcomes, runs, report)
    for outcome in outcomes:
        if outcome.error is not None:
            error = f"{type(outcome.error).__name__}: {outcome.error}"
            console.print(f"{outcome.model.name} failed: {escape(error)}", style="red")
    return report
