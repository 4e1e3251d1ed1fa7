"""Shows a run in whatever loggers the training loop already has."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from repflow.monitor.sinks._base import AbstractSink
from repflow.monitor.sinks._keys import StateChoice, scalar_items
from repflow.monitor.sinks.heatmap import Heatmap, HeatmapSeries
from repflow.monitor.snapshot import RunInfo, Snapshot


class LoggerSink(AbstractSink):
    """Logs scalars and heatmaps to Lightning's loggers, or to any that look like them, under the measured step.

    A logger has `log_metrics(metrics, step)`, and perhaps a `group_separator`. Heatmaps go to those with
    `log_image(key, images, step, caption=...)`, as WandbLogger has, or `experiment.add_image`, as TensorBoardLogger;
    the others get none.

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

    def start(self, run: RunInfo) -> None:
        """Begin a new series of heatmaps."""
        if self._series is not None:
            self._series = HeatmapSeries(self._max_images)

    def write(self, snapshot: Snapshot) -> None:
        """Log the scalars, and the heatmaps if it is their turn."""
        loggers = self._loggers() if callable(self._loggers) else self._loggers
        drawn = self._series.add(snapshot) if self._series is not None else []
        for logger in loggers:
            separator = getattr(logger, "group_separator", "/")
            logger.log_metrics(scalar_items(snapshot, self._states, separator=separator), step=snapshot.step)
            for heatmap in drawn:
                _log_image(logger, f"repflow{separator}{heatmap.name}", heatmap)

    def close(self) -> None:
        """Nothing to do: the loggers belong to the training loop, which may have closed them already."""


def _log_image(logger: Any, key: str, heatmap: Heatmap) -> None:
    """Hand the image to a logger that can show one."""
    if callable(getattr(logger, "log_image", None)):
        logger.log_image(key=key, images=[heatmap.rgb()], step=heatmap.step, caption=[heatmap.caption])
    elif callable(getattr(getattr(logger, "experiment", None), "add_image", None)):
        logger.experiment.add_image(key, heatmap.rgb(), heatmap.step, dataformats="HWC")
