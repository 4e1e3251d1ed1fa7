"""Run files -> figures -> one self-contained HTML page, in a file or served while the runs go on."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path

from repflow._imports import require

__all__ = ["watch_runs", "write_report"]


Paths = str | PathLike[str] | Sequence[str | PathLike[str]]


def write_report(paths: Paths, output: str | PathLike[str], *, baselines: Paths = ()) -> Path:
    """Write one HTML page that shows the runs side by side; it needs no network, no account and no other file.

    Args:
        paths: A run file, or several in the order in which the page shows them. Runs of one name are told apart by
            their paths.
        baselines: Run files whose first snapshot alone is drawn beside the runs, in grey: the same model with random
            weights, say.
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
    from repflow.monitor.report._page import render_content, render_page
    from repflow.monitor.report._runs import load_runs

    target = Path(output)
    files, beside = _files(paths), _files(baselines)
    runs = load_runs(files, beside)
    if any(target.resolve() == file.resolve() for file in (*files, *beside)):
        raise ValueError(f"`write_report`: the output {target} is one of the run files; give another output")
    _write(target, render_page(render_content(runs)))
    return target


def watch_runs(
    paths: Paths, *, port: int = 8714, baselines: Paths = (), announce: Callable[[str], None] = print
) -> None:
    """Serve the page of `write_report` on 127.0.0.1, where it follows the runs, until Ctrl-C.

    A run file may be written, continued, replaced or removed meanwhile, or not exist yet; the page says so. Where
    training runs on another machine, `ssh -L 8714:127.0.0.1:8714 machine` brings the page to this one.

    Args:
        paths: A run file, or several.
        port: Port on 127.0.0.1; 0 for any that is free.
        baselines: As of `write_report`.
        announce: Is told the address, in a sentence.

    Raises:
        ModuleNotFoundError: Plotly, which the extra `report` installs, is missing.
        ValueError: No paths, or one of a folder.
        OSError: The port is taken.
    """
    require("plotly")
    from repflow.monitor.report._follow import Follower
    from repflow.monitor.report._server import PageServer
    from repflow.monitor.sinks.open_run import open_run

    files, beside = _files(paths), _files(baselines)
    if not files:
        raise ValueError("`watch_runs`: expected at least one run file, got none; pass the paths of `*.db` run files")
    for folder in (file for file in (*files, *beside) if file.is_dir()):
        open_run(folder)  # raises, and says which run files are in it
    with PageServer(Follower(files, beside), port) as server:
        announce(f"watching {', '.join(map(str, files))} at {server.url} (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _files(paths: Paths) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, str | PathLike) else paths)]


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
