"""Heatmaps of a run as plain RGB arrays, for loggers that show images."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt8
from numpy import ndarray

from repflow.monitor.snapshot import Snapshot

# Viridis: nine colours evenly spaced in perceived lightness, from dark to light.
_COLORS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
_COLORMAP = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in _COLORS.split()], dtype=np.float64)
NOT_MEASURED = (160, 160, 160)
"""Colour of NaN: a grey, which the colormap does not contain."""

_PIXELS = 512
_STAGES = 10


def colorize(matrix: Float64[ndarray, "H W"], low: float = 0.0, high: float = 1.0) -> UInt8[ndarray, "H W 3"]:
    """Map `low` … `high` to dark … light; what lies outside takes the end's colour, NaN the grey `NOT_MEASURED`."""
    place = np.clip((matrix - low) / (high - low), 0.0, 1.0) * (len(_COLORMAP) - 1)
    missing = np.isnan(place)
    anchors = np.arange(len(_COLORMAP))
    channels = [np.interp(np.where(missing, 0.0, place), anchors, channel) for channel in _COLORMAP.T]
    rgb = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    rgb[missing] = NOT_MEASURED
    return rgb


def enlarge(rgb: UInt8[ndarray, "H W 3"]) -> UInt8[ndarray, "H2 W2 3"]:
    """Repeat pixels by whole factors, so that each side of up to 512 gets to more than 256 pixels and at most 512."""
    height, width = (max(1, _PIXELS // side) for side in rgb.shape[:2])
    return rgb.repeat(height, axis=0).repeat(width, axis=1)


@dataclass(frozen=True)
class Heatmap:
    """A matrix to be shown: rows from bottom to top, columns from left to right."""

    name: str
    step: int
    """The step that was measured."""
    caption: str
    matrix: Float64[ndarray, "H W"]

    def rgb(self) -> UInt8[ndarray, "H W 3"]:
        """The image, some 256 to 512 pixels on a side."""
        return enlarge(colorize(self.matrix[::-1]))


class DepthHistory:
    """A value of every state at every step so far, in a bounded number of columns.

    Once full, every second column goes, and from then on only every second snapshot is kept, and so on: the columns
    always lie evenly over the snapshots.
    """

    def __init__(self, max_columns: int = 256) -> None:
        self._max = max_columns
        self._stride = 1
        self._seen = 0
        self._columns: list[Float64[ndarray, " S"]] = []

    def add(self, values: Float64[ndarray, " S"]) -> None:
        """Take the values of the next snapshot."""
        if self._seen % self._stride == 0:
            self._columns.append(values.copy())
        self._seen += 1
        if len(self._columns) > self._max:
            self._columns = self._columns[::2]
            self._stride *= 2

    def matrix(self) -> Float64[ndarray, "S N"]:
        """State × column."""
        return np.stack(self._columns, axis=1)


class Thinning:
    """Says which of a stream of unknown length to show, so that at most `limit` are shown.

    At first every one is shown, then every second, every fourth and so on, the same number of each.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._each = max(1, limit // _STAGES)
        self._shown = 0
        self._wait = 0

    def __call__(self) -> bool:
        """Whether to show the next one."""
        if self._wait > 0:
            self._wait -= 1
            return False
        if self._shown >= self._limit:
            return False
        self._shown += 1
        self._wait = 2 ** (self._shown // self._each) - 1
        return True


class HeatmapSeries:
    """The heatmaps of a run: CKA of every pair of states, and inter-token similarity over depth and steps so far.

    Args:
        max_images: How many images to show over a whole run. They are thinned out as the run gets longer.
    """

    NAMES = ("cka", "inter_token")

    def __init__(self, max_images: int) -> None:
        least = 2 * len(self.NAMES)
        if max_images < least:
            raise ValueError(f"max_images= must be at least {least}, got {max_images}; heatmaps=False shows none")
        self._history = DepthHistory()
        self._show = Thinning(max_images // len(self.NAMES) - 1)  # one is for `last`
        self._pending: Snapshot | None = None

    def add(self, snapshot: Snapshot) -> list[Heatmap]:
        """Take the next snapshot; returns what to show of it, which may be nothing."""
        self._history.add(snapshot.inter_token.numpy())
        if not self._show():
            self._pending = snapshot
            return []
        self._pending = None
        return self._draw(snapshot)

    def last(self) -> list[Heatmap]:
        """The heatmaps of the last snapshot, if they were not shown."""
        snapshot, self._pending = self._pending, None
        return [] if snapshot is None else self._draw(snapshot)

    def _draw(self, snapshot: Snapshot) -> list[Heatmap]:
        scale = "0 dark to 1 light, grey: not measured"
        cka = f"CKA, state × state from the lower left, {scale}"
        similarity = f"inter-token similarity, depth (upwards) × steps so far, {scale}"
        return [
            Heatmap("cka", snapshot.step, cka, snapshot.cka.numpy().copy()),
            Heatmap("inter_token", snapshot.step, similarity, self._history.matrix()),
        ]
