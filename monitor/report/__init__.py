"""Run files -> figures -> one self-contained HTML page."""

from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path

from repflow._imports import require

__all__ = ["write_report"]


def write_report(paths: str | PathLike[str] | Sequence[str | PathLike[str]], output: str | PathLike[str]) -> Path:
    """Write one HTML page that shows the runs side by side; it needs no network, no account and no other file.

    Args:
        paths: A run file, or several in the order in which the page shows them. Runs of one name are told apart by
            their paths.
        output: The page to write. Missing folders are made; an existing file is replaced once the page is complete.

    Returns:
        The path of the page.

    Raises:
        ModuleNotFoundError: Plotly, which the extra `report` installs, is missing.
        ValueError: No paths, some that are not run files (all are named, and nothing is written), or an `output` that
            is one of the run files.
        OSError: The page cannot be written.
    """
    require("plotly")
    # Only now, since these import plotly.
    from repflow.monitor.report._page import render_page
    from repflow.monitor.report._runs import load_runs

    target = Path(output)
    files = [Path(path) for path in ([paths] if isinstance(paths, str | PathLike) else paths)]
    runs = load_runs(files)
    if any(target.resolve() == file.resolve() for file in files):
        raise ValueError(f"`write_report`: the output {target} is one of the run files; give another output")
    _write(target, render_page(runs))
    return target


def _write(target: Path, page: str) -> None:
    """Put the page in place as a whole: a full disk leaves no half of one, and an older page as it was."""
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        part.replace(target)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = error.strerror or error
        raise OSError(
            f"`write_report`: cannot write the report to {target}: {reason}; give another output file"
        ) from error
