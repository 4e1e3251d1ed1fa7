"""A demo from its options to the table and the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from repflow._imports import require
from repflow.monitor.demo.options import Demo

if TYPE_CHECKING:
    from repflow.monitor.demo.summary import RunSummary
    from repflow.monitor.demo.training import Outcome


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What came of a demo."""

    outcomes: Sequence["Outcome"]
    """One for each model that was started."""
    report: Path | None
    """The page, if there was anything to show and it could be written."""
    errors: Sequence[Exception] = ()
    """What failed: models, then the report."""

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 1 if anything failed, else 0."""
        if any(outcome.interrupted for outcome in self.outcomes):
            return 130
        return int(bool(self.errors))


def run_demo(demo: Demo, console: Console | None = None) -> DemoResult:
    """Train the models, show the table, write the report.

    A model that fails does not keep the others from running. Ctrl-C ends the training under way, and what is there is
    shown.

    Raises:
        ModuleNotFoundError: Lightning, transformers or plotly is missing.
        DemoError: the text cannot be trained on.
        RunFileError: a run file in the folder is none.
        OSError: the folder cannot be written to.
    """
    console = console or Console()
    require("lightning")
    require("transformers")
    require("plotly")
    with console.status("loading text, torch, lightning and transformers …"):
        from repflow.monitor.demo.text import load_corpus

        corpus = load_corpus(demo.text, sequence=demo.recipe.sequence, batch=demo.recipe.batch)
        from repflow.monitor.demo.training import device_name, train

    _prepare(demo)
    names = ", ".join(model.name for model in demo.models)
    console.print(
        f"{names}: {demo.steps} steps of {demo.recipe.batch} × {demo.recipe.sequence} bytes each, on {device_name()}, "
        f"from {escape(corpus.source)} ({len(corpus.train):,} bytes); a snapshot every {demo.every_n_steps} steps"
    )
    outcomes: list[Outcome] = []
    for model in demo.models:
        outcomes.append(train(model, demo, corpus, console))
        if outcomes[-1].interrupted:
            console.print("interrupted: showing what is there", style="yellow")
            break
    return _show(outcomes, demo, console)


def _prepare(demo: Demo) -> None:
    """Make the folder, and find out now, not after training, whether a file in it is in the way."""
    from repflow.monitor.demo.summary import last_attempt

    demo.folder.mkdir(parents=True, exist_ok=True)
    for model in demo.models:
        last_attempt(demo.run_file(model))


def _show(outcomes: Sequence["Outcome"], demo: Demo, console: Console) -> DemoResult:
    """The report comes last: what fails at it hides nothing else."""
    from repflow.monitor.demo.summary import show_report, show_runs, show_table
    from repflow.monitor.report import write_report

    summaries = [_read(outcome, demo) for outcome in outcomes]
    runs = [outcome.run_file for outcome, summary in zip(outcomes, summaries, strict=True) if summary]
    show_table(console, outcomes, summaries)
    show_runs(console, outcomes, runs)
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    page, report, reason = demo.folder / "report.html", None, "no run holds a snapshot"
    if runs:
        try:
            report = write_report(runs, page)
        except OSError as error:
            errors.append(error)
            reason = str(error)
    show_report(console, runs, page, missing=None if report else reason)
    return DemoResult(outcomes=outcomes, report=report, errors=errors)


def _read(outcome: "Outcome", demo: Demo) -> "RunSummary | None":
    """What a training left in its run file. Less than it should have left is a failure."""
    from repflow.monitor.demo.summary import summarise
    from repflow.monitor.sinks import RunFileError

    try:
        summary = summarise(outcome.run_file, attempt=outcome.attempt)
    except (RunFileError, OSError) as error:
        outcome.error = outcome.error or error
        return None
    stored, expected = summary.snapshots if summary else 0, math.ceil(outcome.steps / demo.every_n_steps)
    if stored < expected and outcome.error is None and not outcome.interrupted:
        outcome.error = RunFileError(
            f"{outcome.run_file}: expected {expected} snapshots of this training, found {stored}; "
            "the warnings above say why"
        )
    return summary
