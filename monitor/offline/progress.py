"""How work shows that it is under way: how far, how fast, and for how long still."""

import time
from types import TracebackType

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


class WorkProgress:
    """A bar on a terminal; elsewhere, such as in a log file, ten lines. A context manager.

    Args:
        console: where to show it; nowhere if None.
        label: of what is worked on.
        total: how many units there are; of an extraction tokens, padding not included.
        done: how many of them an earlier process has done.
        unit: what they are, in the plural.
    """

    def __init__(self, console: Console | None, label: str, total: int, done: int, *, unit: str = "tokens") -> None:
        self._console, self._label, self._total, self._unit = console, label, total, unit
        self._first = self._done = done
        self._began = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> "WorkProgress":
        if self._console is None:
            return self
        if self._done:
            self._console.print(Text(f"{self._label}: goes on at {self._share():.0%}"), soft_wrap=True)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                _Rate(self._unit),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._bar.add_task(self._label, total=self._total, completed=self._done)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, units: int) -> None:
        """So many more are done."""
        before = int(10 * self._share())
        self._done += units
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif self._console is not None and int(10 * self._share()) > before:
            rate = (self._done - self._first) / max(time.perf_counter() - self._began, 1e-9)
            left = (self._total - self._done) / rate
            told = f"{self._share():.0%}, {_per_second(rate, self._unit)}, {int(left // 60)}:{int(left % 60):02d} left"
            self._console.print(Text(f"{self._label}: {told}"), soft_wrap=True)

    def _share(self) -> float:
        return self._done / max(self._total, 1)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else _per_second(task.speed, self._unit), style="progress.data.speed")


def _per_second(rate: float, unit: str) -> str:
    size, suffix = pick_unit_and_suffix(int(rate), ["", "K", "M", "G"], 1000)
    return f"{rate / size:.1f}{suffix} {unit}/s"
