"""What the demo says at the end: a table of its runs, and where everything lies."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from repflow.monitor.sinks import open_run

if TYPE_CHECKING:
    import xarray

    from repflow.monitor.demo.training import Outcome

_NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The last snapshot of a run, in a few numbers. Values are those of `Snapshot`."""

    parameters: int
    blocks: Counter[str]
    """Blocks by kind."""
    states: tuple[int, int, int]
    """The first, the middle and the last state."""
    inter_token: tuple[float, float, float]
    """Inter-token similarity at `states`."""
    v_loc: float
    v_glob: float
    cka: float
    """CKA of the first and the last state."""
    step: int
    """When the snapshot was taken."""
    snapshots: int
    overhead_ms: float
    """Spent on monitoring over all snapshots."""


def last_attempt(path: Path) -> int:
    """Number of the latest attempt in a run file; 0 if the file is missing, or was left empty by a full disk.

    Raises:
        RunFileError: not a run file.
    """
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return 0
    return int(open_run(path).attrs["attempt"])


def summarise(path: Path, *, attempt: int = 1) -> RunSummary | None:
    """Read the latest attempt of a run file; None if it is older than `attempt`, or holds no snapshot yet.

    Raises:
        RunFileError: not a run file.
    """
    latest = last_attempt(path)
    if latest < attempt:
        return None
    run = open_run(path, attempt=latest)
    if run.sizes["step"] == 0:
        return None
    last = run.isel(step=-1)
    final = run.sizes["state"] - 1
    states = (0, final // 2, final)
    early, middle, late = (_number(last["inter_token"][state]) for state in states)
    return RunSummary(
        parameters=int(run.attrs["parameters"]),
        blocks=Counter(run["block_kind"].values.tolist()),
        states=states,
        inter_token=(early, middle, late),
        v_loc=_number(last["v_loc"]),
        v_glob=_number(last["v_glob"]),
        cka=_number(last["cka"][0, final]),
        step=int(last["step"]),
        snapshots=run.sizes["step"],
        overhead_ms=_number(run["overhead_ms"].sum()),
    )


def _number(array: "xarray.DataArray") -> float:
    return float(array.item())


def show_table(console: Console, outcomes: Sequence["Outcome"], summaries: Sequence[RunSummary | None]) -> None:
    """Print one column per model. A run without a snapshot shows dashes."""
    table = Table(title="Representations at the last snapshot", title_justify="left")
    table.add_column("")
    columns = [_column(outcome, run) for outcome, run in zip(outcomes, summaries, strict=True)]
    for outcome in outcomes:
        table.add_column(outcome.model.name, justify="right")
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    console.print(table)
    console.print(
        "validation loss: nats per byte, before and after training. inter-token similarity: 0 for tokens in "
        "unrelated directions, 1 for tokens collapsed onto each other.",
        style="dim",
    )


def _column(outcome: "Outcome", run: RunSummary | None) -> dict[str, str]:
    """Label -> cell."""
    cells = {
        "family": outcome.model.family,
        "parameters": f"{run.parameters:,}" if run else _NOTHING,
        "blocks": " + ".join(f"{count} {kind}" for kind, count in run.blocks.items()) if run else _NOTHING,
        "steps (snapshots)": f"{outcome.steps} ({run.snapshots if run else 0})",
        "validation loss": f"{_loss(outcome.first_loss)} → {_loss(outcome.last_loss)}",
    }
    for position, name in enumerate(("first", "middle", "last")):
        cells[f"inter-token similarity, {name} state"] = f"{run.inter_token[position]:.3f}" if run else _NOTHING
    cells["V_loc"] = f"{run.v_loc:.3g}" if run else _NOTHING
    cells["V_glob"] = f"{run.v_glob:.3g}" if run else _NOTHING
    cells["CKA, first to last state"] = f"{run.cka:.3f}" if run else _NOTHING
    share = run.overhead_ms / 1000 / outcome.seconds if run and outcome.seconds else None
    cells["monitoring, share of training time"] = f"{share:.1%}" if share is not None else _NOTHING
    return cells


def _loss(loss: float | None) -> str:
    return _NOTHING if loss is None else f"{loss:.2f}"


def show_runs(console: Console, outcomes: Sequence["Outcome"], runs: Sequence[Path]) -> None:
    """Print where the run files and the W&B runs lie, and what failed."""
    for run in runs:
        _show(console, "run file", shown(run))
    for outcome in outcomes:
        if outcome.tracking is not None:
            where = outcome.tracking.where
            _show(console, "W&B", shown(Path(where)) if Path(where).is_absolute() else where)
    for outcome in outcomes:
        if (error := outcome.error) is not None:
            failure = f"{outcome.model.name} failed: {type(error).__name__}: {' '.join(str(error).split())}"
            console.print(Text(failure, style="red"), soft_wrap=True)


def show_report(console: Console, runs: Sequence[Path], report: Path, *, missing: str | None) -> None:
    """Print where the report lies, or the reason why it is `missing`, and how to make it again."""
    if missing is None:
        _show(console, "report", f"{shown(report)}  (open it in a browser)")
    else:
        _show(console, "report", f"none, because {missing}", style="red")
    if runs:
        command = ["repflow report", *(quote(shown(run)) for run in runs), "-o", quote(shown(report))]
        _show(console, "again", " ".join(command))


def _show(console: Console, label: str, value: str, style: str = "none") -> None:
    # Not wrapped, whatever the width of the terminal, so that it can be copied.
    console.print(Text(f"{label:<10}", style="bold").append(value, style=style), soft_wrap=True)


def shown(path: Path) -> str:
    """A path as a user would type it here: relative where it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
