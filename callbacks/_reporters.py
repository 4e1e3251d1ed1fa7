"""Shows a run where the Hugging Face Trainer reports to: an open W&B run, and TensorBoard."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from repflow._imports import PILLOW
from repflow.monitor import RunInfo, Snapshot
from repflow.monitor.sinks import AbstractSink, FanOutSink, LoggerSink, RunFileSink, WandbSink
from repflow.monitor.sinks._keys import StateChoice


class ReporterSink(AbstractSink):
    """Logs scalars and heatmaps to what is there when the first snapshot comes: all reporters have begun by then.

    `Trainer.log` would be too late, for a snapshot arrives after its step, and would name our keys after itself.

    Args:
        callbacks: gives those of the Trainer.
        states: which states become scalars.
        to_wandb: False where another sink logs to W&B already.
        run_file: the sink whose file becomes an artifact of the W&B run.
    """

    def __init__(
        self,
        callbacks: Callable[[], Iterable[object]],
        states: StateChoice,
        *,
        to_wandb: bool,
        run_file: RunFileSink | None = None,
    ) -> None:
        self._callbacks = callbacks
        self._states: StateChoice = states
        self._to_wandb, self._run_file = to_wandb, run_file
        self._writers: list[Any] = []
        self._sink = FanOutSink(())

    def start(self, run: RunInfo) -> None:
        """Look for reporters."""
        from transformers.integrations.integration_utils import TensorBoardCallback

        self.close()
        sinks: list[AbstractSink] = []
        wandb_run = getattr(sys.modules.get("wandb"), "run", None)  # where one is open, wandb has been imported
        if self._to_wandb and wandb_run is not None:
            options: dict[str, Any] = {"heatmaps": bool(PILLOW), "run_file": self._run_file}
            sinks.append(WandbSink(wandb_run, states=self._states, also_step="train/global_step", **options))
        boards = [callback for callback in self._callbacks() if isinstance(callback, TensorBoardCallback)]
        self._writers = [board.tb_writer for board in boards if board.tb_writer is not None]
        if self._writers:
            sinks.append(LoggerSink([_Board(writer) for writer in self._writers], states=self._states))
        self._sink = FanOutSink(sinks)
        self._sink.start(run)

    def write(self, snapshot: Snapshot) -> None:
        """Log it to each."""
        self._sink.write(snapshot)

    def flush(self) -> None:
        """Flush each."""
        self._sink.flush()
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Log the last heatmaps. The W&B run stays open; writers, which open again by themselves, are closed."""
        self._sink.close()
        for writer in self._writers:
            writer.close()
        self._sink, self._writers = FanOutSink(()), []


class _Board:
    """TensorBoard's `SummaryWriter`, as `LoggerSink` knows loggers."""

    def __init__(self, writer: Any) -> None:
        self.experiment = writer

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.experiment.add_scalar(key, value, step)
