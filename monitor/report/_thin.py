"""Fewer values than were measured, so that a page over thousands of snapshots stays light."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAMES = 30
"""Most snapshots per run that the slider runs through."""
HEATMAP_COLUMNS = 300
"""Most columns of a heatmap over steps."""
CURVE_POINTS = 2000
"""Most points of a curve over steps."""


def spread(count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` of the indices 0 … count−1, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def bin_maxima(values: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """Maxima over at most `limit` bins of axis 0, so that no outlier is lost; NaN where a whole bin is NaN.

    Bin k ends with index `spread(len(values), limit)[k]`.
    """
    ends = spread(len(values), limit) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return np.fmax.reduceat(values, starts, axis=0)


def rounded(values: NDArray[np.floating[Any]], digits: int = 4) -> list[Any]:
    """Nested lists of floats with `digits` significant digits; None, which JSON has, where a value is not finite."""
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]
