"""Run files that are being written, read again whenever they have changed."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import xarray as xr

from repflow.monitor.report._page import Content, render_content
from repflow.monitor.report._runs import named_apart
from repflow.monitor.sinks.open_run import RunFileError, open_run
from repflow.monitor.warning import RepflowWarning

RESTING = 4.0
"""Reading and rendering rests for this many times as long as it took: it shares the machine with the training."""

_Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass
class _Followed:
    """A run file, and what was last read from it."""

    path: Path
    stamp: _Stamp | None = None
    """Of the files when they were read; None to have them read again."""
    data: xr.Dataset | None = None
    problem: str = ""
    """Why the file could not be read, or not again."""

    def refresh(self) -> bool:
        """Read the file if it has changed; whether there is anything new."""
        stamp = _stamp(self.path)
        if stamp == self.stamp:
            return False
        problem_before, self.stamp = self.problem, stamp
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RepflowWarning)  # the page shows what is missing
                self.data, self.problem = open_run(self.path), ""
        except (RunFileError, OSError) as error:
            self.stamp, self.problem = None, self._explained(error)
        return not self.problem or self.problem != problem_before

    def _explained(self, error: Exception) -> str:
        if self.data is not None:
            what = "gone" if isinstance(error, FileNotFoundError) else f"not readable now ({error})"
            return f"{self.path} is {what}; shown is what it held before."
        if isinstance(error, FileNotFoundError):
            return f"Waiting for {self.path}: there is no such file yet."
        return f"Waiting for a run in it: {error}"


class Follower:
    """What the page of some runs shows at present, for any number of threads.

    Args:
        files: The run files; none needs to exist yet. One that vanishes is shown as it was last read.
        baselines: Of which only the first snapshot is shown.
    """

    def __init__(self, files: Sequence[Path], baselines: Sequence[Path] = ()) -> None:
        self._followed = [_Followed(path) for path in (*files, *baselines)]
        self._first_baseline = len(files)
        self._lock = Lock()
        self._born = time.time_ns()
        self._count = 0
        self._content: Content | None = None
        self._rest_until = 0.0

    @property
    def problems(self) -> list[str]:
        """Why files cannot be read, in their order."""
        return [followed.problem for followed in self._followed if followed.problem]

    def current(self) -> tuple[str, Content]:
        """The content and its version, which no other content has or had, in this process or another."""
        with self._lock:
            if self._content is None or time.monotonic() >= self._rest_until:
                began = time.monotonic()
                if any([followed.refresh() for followed in self._followed]) or self._content is None:
                    self._content = None  # what cannot be rendered is tried again
                    self._content = self._render()
                    self._count += 1
                ended = time.monotonic()
                self._rest_until = ended + RESTING * (ended - began)
            return f"{self._born:x}-{self._count}", self._content

    def _render(self) -> Content:
        opened = {place: one.data for place, one in enumerate(self._followed) if one.data is not None}
        runs = named_apart(opened, [one.path for one in self._followed], first_baseline=self._first_baseline)
        return render_content(runs, notices=self.problems)


def _stamp(path: Path) -> _Stamp:
    """What changes when a run file or its log is written, replaced or removed."""
    return tuple(_file_stamp(path.with_name(path.name + suffix)) for suffix in ("", "-wal", "-journal"))


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
