"""How the demo shows a training under way."""

from types import TracebackType
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress(L.Callback):
    """A bar with the loss on a terminal; elsewhere, such as in a log file, ten lines.

    A context manager, so that the bar is gone from the terminal's control however the training ends.

    Args:
        console: where to show it.
        label: name of the model.
        steps: length of the training, in optimizer steps.
    """

    def __init__(self, console: Console, *, label: str, steps: int) -> None:
        self._console = console
        self._label = label
        self._steps = steps
        self._bar: Progress | None = None

    def __enter__(self) -> "TrainingProgress":
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._bar.add_task(self._label, total=self._steps, loss="  – ")
            self._bar.start()
        else:
            self._console.print(f"{self._label}: training for {self._steps} steps")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step; a hundred times per training at most, since reading the loss waits for the device."""
        done = trainer.global_step
        if done % max(1, self._steps // 100) and done != self._steps:
            return
        loss = f"{float(outputs['loss']):.2f}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, loss=loss)
        elif done % max(1, self._steps // 10) == 0:
            self._console.print(f"{self._label}: step {done} of {self._steps}, loss {loss}")
