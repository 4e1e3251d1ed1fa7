"""Shows a run in whatever loggers the training loop already has."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from repflow.monitor.alert import Alert
from repflow.monitor.sinks._base import AbstractSink
from repflow.monitor.sinks._keys import StateChoice, scalar_items
from repflow.monitor.sinks._wandb_run import STEP, define_keys, is_wandb_run, send_alerts
from repflow.monitor.sinks.heatmap import Heatmap, HeatmapSeries
from repflow.monitor.sinks.run_file import RunFileSink
from repflow.monitor.sinks.wandb_sink import save_run_file
from repflow.monitor.snapshot import RunInfo, Snapshot
from repflow.monitor.warning import warn


class LoggerSink(AbstractSink):
    """Logs scalars and heatmaps to Lightning's loggers, or to any that look like them, under the measured step.

    A logger has `log_metrics(metrics, step)`, and perhaps a `group_separator`. Heatmaps go to those with
    `log_image(key, images, step, caption=...)`, as WandbLogger has, or `experiment.add_image`, as TensorBoardLogger;
    the others get none. Alerts go to W&B as its own, and to those with `experiment.add_text`, as TensorBoardLogger has.
    A logger that fails is left out for the rest of the run, with one warning; one that fails at an image, as all do
    without Pillow, or at an alert, gets no more of these.

    Args:
        loggers: The loggers, or a function that returns them, called at every snapshot (`lambda: trainer.loggers`).
        states: Which states become scalars: "auto", "all" or their numbers.
        heatmaps: Whether to log images.
        max_images: The most images of one run for each logger, thinned out as it gets longer.
        run_file: A run file, or the sink that writes it, to be saved as an artifact of W&B runs on `close`.

    Raises:
        TypeError: something that is no logger.
        ValueError: `max_images` is too small.
    """

    def __init__(
        self,
        loggers: Callable[[], Iterable[Any]] | Sequence[Any],
        *,
        states: StateChoice = "auto",
        heatmaps: bool = True,
        max_images: int = 300,
        run_file: str | os.PathLike[str] | RunFileSink | None = None,
    ) -> None:
        listed = isinstance(loggers, Sequence) and all(hasattr(logger, "log_metrics") for logger in loggers)
        if not (listed or callable(loggers)):
            raise TypeError(
                "`LoggerSink`: expected a list of loggers with a method log_metrics(metrics, step), or a function that "
                f"returns one, got {loggers!r}; write LoggerSink([logger])"
            )
        self._loggers = loggers
        self._run_file = run_file
        self._unsaved: str | os.PathLike[str] | RunFileSink | None = None  # from `start` to `close`
        self._states: StateChoice = states
        self._max_images = max_images
        self._series = HeatmapSeries(max_images) if heatmaps else None
        self._failed: list[Any] = []  # by identity: a logger need not be hashable
        self._defined: list[Any] = []
        self._without: dict[str, list[Any]] = {}  # kind of what a logger failed at -> those loggers

    def start(self, run: RunInfo) -> None:
        """Begin a new series of heatmaps, and try every logger again."""
        if self._series is not None:
            self._series = HeatmapSeries(self._max_images)
        self._failed, self._defined, self._without = [], [], {}
        self._unsaved = self._run_file

    def write(self, snapshot: Snapshot) -> None:
        """Log the scalars, and the heatmaps if it is their turn."""
        for logger in self._working():
            items = scalar_items(snapshot, self._states, separator=_separator(logger))
            try:
                if is_wandb_run(getattr(logger, "experiment", None)):
                    items = self._for_wandb(logger, items, snapshot)
                logger.log_metrics(items, step=snapshot.step)
            except Exception as error:
                self._failed.append(logger)
                warn(f"{_failure(logger, error)}; it gets nothing more of this run")
        if snapshot.alerts:
            self._each("alert", lambda logger: _log_alerts(logger, snapshot.alerts))
        if self._series is not None:
            self._log_images(self._series.add(snapshot))

    def close(self) -> None:
        """Log the last heatmaps and the artifact; the loggers stay open, since they belong to the training loop."""
        if self._series is not None:
            self._log_images(self._series.last())
        run_file, self._unsaved = self._unsaved, None
        if run_file is not None:
            self._each("artifact", lambda logger: _log_run_file(logger, run_file))

    def _for_wandb(self, logger: Any, items: dict[str, float], snapshot: Snapshot) -> dict[str, float]:
        """What a W&B run gets, over the same axis under any loop. The keys are defined before their first values."""
        if not _among(logger, self._defined):
            self._defined.append(logger)
            define_keys(logger.experiment, items, num_states=len(snapshot.inter_token))
        return {STEP: float(snapshot.step), **items}

    def _working(self) -> list[Any]:
        """The loggers that have not failed."""
        loggers = self._loggers() if callable(self._loggers) else self._loggers
        return [logger for logger in loggers if not _among(logger, self._failed)]

    def _log_images(self, drawn: Sequence[Heatmap]) -> None:
        if drawn:
            self._each("image", lambda logger: _log_images(logger, drawn))

    def _each(self, kind: str, call: Callable[[Any], None]) -> None:
        """Have every logger take something, except those that failed at something of that kind."""
        failed = self._without.setdefault(kind, [])
        for logger in self._working():
            if _among(logger, failed):
                continue
            try:
                call(logger)
            except Exception as error:
                failed.append(logger)
                warn(f"{_failure(logger, error)}, at an {kind}; it gets no more of them, while scalars go on")


def _among(logger: Any, others: Iterable[Any]) -> bool:
    return any(logger is other for other in others)


def _separator(logger: Any) -> str:
    return getattr(logger, "group_separator", "/")


def _failure(logger: Any, error: Exception) -> str:
    return f"{type(logger).__name__} failed with {type(error).__name__}: {error}"


def _log_images(logger: Any, drawn: Sequence[Heatmap]) -> None:
    """Hand images to a logger that can show them."""
    for heatmap in drawn:
        key = f"repflow{_separator(logger)}{heatmap.name}"
        if callable(getattr(logger, "log_image", None)):
            logger.log_image(key=key, images=[heatmap.rgb()], step=heatmap.step, caption=[heatmap.caption])
        elif callable(getattr(getattr(logger, "experiment", None), "add_image", None)):
            logger.experiment.add_image(key, heatmap.rgb(), heatmap.step, dataformats="HWC")


def _log_alerts(logger: Any, alerts: Sequence[Alert]) -> None:
    """Hand alerts to a logger that can show text."""
    experiment = getattr(logger, "experiment", None)
    if is_wandb_run(experiment):
        send_alerts(experiment, alerts)
    elif callable(getattr(experiment, "add_text", None)):
        for alert in alerts:
            text = f"**{alert.severity}: {alert.title}**\n\n{alert.message}.\n\n{alert.suggestion}."
            logger.experiment.add_text(f"repflow{_separator(logger)}alerts", text, alert.step)


def _log_run_file(logger: Any, run_file: str | os.PathLike[str] | RunFileSink) -> None:
    """Save the run file with a W&B run."""
    if is_wandb_run(getattr(logger, "experiment", None)):
        save_run_file(logger.experiment, run_file)
