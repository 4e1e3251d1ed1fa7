"""How an extraction shows that it is under way: how far, how fast, and for how long still."""

import time
from types import TracebackType

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


class ExtractionProgress:
    """A bar on a terminal; elsewhere, such as in a log file, ten lines. A context manager.

    Args:
        console: where to show it; nowhere if None.
        label: of what is extracted.
        total: tokens, padding not included.
        done: how many of them an earlier process has done.
    """

    def __init__(self, console: Console | None, label: str, total: int, done: int) -> None:
        self._console, self._label, self._total = console, label, total
        self._first = self._done = done
        self._began = time.perf_counter()
        self._bar: Progress | None = None

    def __enter__(self) -> "ExtractionProgress":
        if self._console is None:
            return self
        if self._done:
            self._console.print(Text(f"{self._label}: goes on at {self._share():.0%}"))
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                _TokenRate(),
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

    def advance(self, tokens: int) -> None:
        """So many more tokens are done."""
        before = int(10 * self._share())
        self._done += tokens
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif self._console is not None and int(10 * self._share()) > before:
            rate = (self._done - self._first) / max(time.perf_counter() - self._began, 1e-9)
            left = (self._total - self._done) / rate
            told = f"{self._share():.0%}, {_per_second(rate)}, {int(left // 60)}:{int(left % 60):02d} left"
            self._console.print(Text(f"{self._label}: {told}"))

    def _share(self) -> float:
        return self._done / max(self._total, 1)


class _TokenRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else _per_second(task.speed), style="progress.data.speed")


def _per_second(rate: float) -> str:
    unit, suffix = pick_unit_and_suffix(int(rate), ["", "K", "M", "G"], 1000)
    return f"{rate / unit:.1f}{suffix} tokens/s"
