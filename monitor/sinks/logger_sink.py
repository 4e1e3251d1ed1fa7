"""Shows a run in whatever loggers the training loop already has."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from repflow.monitor.sinks._base import AbstractSink
from repflow.monitor.sinks._keys import StateChoice, scalar_items
from repflow.monitor.sinks.heatmap import Heatmap, HeatmapSeries
from repflow.monitor.snapshot import RunInfo, Snapshot
from repflow.monitor.warning import warn


class LoggerSink(AbstractSink):
    """Logs scalars and heatmaps to Lightning's loggers, or to any that look like them, under the measured step.

    A logger has `log_metrics(metrics, step)`, and perhaps a `group_separator`. Heatmaps go to those with
    `log_image(key, images, step, caption=...)`, as WandbLogger has, or `experiment.add_image`, as TensorBoardLogger;
    the others get none. A logger that fails is left out for the rest of the run, with one warning; one that fails at an
    image, as all do without Pillow, gets scalars only.

    Args:
        loggers: The loggers, or a function that returns them, called at every snapshot (`lambda: trainer.loggers`).
        states: Which states become scalars: "auto", "all" or their numbers.
        heatmaps: Whether to log images.
        max_images: The most images of one run for each logger, thinned out as it gets longer.

    Raises:
        ValueError: `max_images` is too small.
    """

    def __init__(
        self,
        loggers: Callable[[], Iterable[Any]] | Sequence[Any],
        *,
        states: StateChoice = "auto",
        heatmaps: bool = True,
        max_images: int = 300,
    ) -> None:
        self._loggers = loggers
        self._states: StateChoice = states
        self._max_images = max_images
        self._series = HeatmapSeries(max_images) if heatmaps else None
        self._failed: list[Any] = []  # by identity: a logger need not be hashable
        self._without_images: list[Any] = []

    def start(self, run: RunInfo) -> None:
        """Begin a new series of heatmaps, and try every logger again."""
        if self._series is not None:
            self._series = HeatmapSeries(self._max_images)
        self._failed, self._without_images = [], []

    def write(self, snapshot: Snapshot) -> None:
        """Log the scalars, and the heatmaps if it is their turn."""
        for logger in self._working():
            items = scalar_items(snapshot, self._states, separator=_separator(logger))
            try:
                logger.log_metrics(items, step=snapshot.step)
            except Exception as error:
                self._failed.append(logger)
                warn(f"{_failure(logger, error)}; it gets nothing more of this run")
        if self._series is not None:
            self._log_images(self._series.add(snapshot))

    def close(self) -> None:
        """Log the last heatmaps; the loggers stay open, since they belong to the training loop."""
        if self._series is not None:
            self._log_images(self._series.last())

    def _working(self) -> list[Any]:
        """The loggers that have not failed."""
        loggers = self._loggers() if callable(self._loggers) else self._loggers
        return [logger for logger in loggers if not _among(logger, self._failed)]

    def _log_images(self, drawn: Sequence[Heatmap]) -> None:
        if not drawn:
            return
        for logger in self._working():
            if _among(logger, self._without_images):
                continue
            try:
                for heatmap in drawn:
                    _log_image(logger, f"repflow{_separator(logger)}{heatmap.name}", heatmap)
            except Exception as error:
                self._without_images.append(logger)
                warn(f"{_failure(logger, error)}, at an image; it gets no more of them, while scalars go on")


def _among(logger: Any, others: Iterable[Any]) -> bool:
    return any(logger is other for other in others)


def _separator(logger: Any) -> str:
    return getattr(logger, "group_separator", "/")


def _failure(logger: Any, error: Exception) -> str:
    return f"{type(logger).__name__} failed with {type(error).__name__}: {error}"


def _log_image(logger: Any, key: str, heatmap: Heatmap) -> None:
    """Hand the image to a logger that can show one."""
    if callable(getattr(logger, "log_image", None)):
        logger.log_image(key=key, images=[heatmap.rgb()], step=heatmap.step, caption=[heatmap.caption])
    elif callable(getattr(getattr(logger, "experiment", None), "add_image", None)):
        logger.experiment.add_image(key, heatmap.rgb(), heatmap.step, dataformats="HWC")
