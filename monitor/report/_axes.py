"""Axes of figures, as plain JSON-able dicts of Plotly: the scales that panels share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repflow.monitor.report._runs import Run
from repflow.monitor.report._thin import HEATMAP_COLUMNS, spread

Figure = dict[str, Any]
"""A Plotly figure, or a part of one."""
Floats = NDArray[np.float64]

EXTREME_RATIO = 20.0
"""Values further apart than this are drawn on a logarithmic axis."""
CLIPPED_SHARE = 0.2
"""Share of the values of a clipped heatmap that shares the darkest colour."""


def plotly_text(text: str) -> str:
    """`text` so that Plotly, which reads a subset of HTML in every label, shows it as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def value_axis(title: str, values: Sequence[Floats], *, bounds: tuple[float, float] | None = None) -> Figure:
    """A vertical axis that all panels of a quantity share, over `bounds` extended to the values, with some air.

    Without bounds, positive values that differ by more than `EXTREME_RATIO` get a logarithmic axis.
    """
    low, high = finite_range(values, bounds)
    if bounds is None and low > 0 and high / low > EXTREME_RATIO:
        return _log_axis(title, low, high)
    air = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    # Not 200µ, as Plotly would have it.
    return {"title": {"text": _axis_title(title)}, "range": [low - air, high + air], "exponentformat": "e"}


def _log_axis(title: str, low: float, high: float) -> Figure:
    """Plotly's own ticks leave short logarithmic axes with one label or none."""
    first, last = np.log10(low), np.log10(high)
    air = 0.05 * (last - first)
    digits = (1, 2, 5) if last - first < 3 else (1,)
    decades = range(int(np.floor(first)), int(np.ceil(last)) + 1)
    return {
        "title": {"text": _axis_title(f"{title} (log)")},
        "type": "log",
        "range": [float(first - air), float(last + air)],
        "tickvals": [digit * 10.0**decade for decade in decades for digit in digits],
        "tickformat": "~g",
    }


def finite_range(values: Sequence[Floats], bounds: tuple[float, float] | None = None) -> tuple[float, float]:
    """Smallest and largest finite value, `bounds` included; 0 and 1 if there is none."""
    parts = [part[np.isfinite(part)] for part in values]
    found = np.concatenate([np.asarray(bounds or (), dtype=np.float64), *parts])
    return (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)


def upper_range(values: Sequence[Floats]) -> tuple[float, float]:
    """The range of the upper `1 - CLIPPED_SHARE` of the values.

    A few that are far below the others would otherwise leave one colour for all of those: adjacent cosines of a block
    that rewrites the stream, often the first one; drift over the first steps.
    """
    _, high = finite_range([part.ravel() for part in values])
    known = np.concatenate([part[np.isfinite(part)] for part in values])
    low = float(np.quantile(known, CLIPPED_SHARE)) if known.size else 0.0
    return min(low, high - 1e-3), high


def shown_steps(runs: Sequence[Run]) -> tuple[float, float]:
    """First and last step of all runs, and half a column of the widest heatmap on both sides, so that none is cut."""
    first, last = min(run.steps[0] for run in runs), max(run.steps[-1] for run in runs)
    margin = max(column_width(run.steps, float(last - first)) for run in runs) / 2
    return float(first) - margin, float(last) + margin


def column_width(steps: NDArray[np.int64], span: float) -> int:
    """The most steps that a heatmap's column of one snapshot covers: the median gap between those that are shown.

    A single snapshot covers a fiftieth of the `span` of the axis, so that it can be seen.
    """
    if len(steps) == 1:
        return max(1, int(span) // 50)
    stride = int(np.diff(spread(len(steps), HEATMAP_COLUMNS)).max())
    return int(np.ceil(np.median(np.diff(steps)))) * stride


def step_axis(step_range: tuple[float, float]) -> Figure:
    """The steps that all panels show."""
    low, high = step_range
    # A step is whole: no ticks between.
    ticks = {"dtick": 1} if high - low <= 6 else {"nticks": 6}
    return {"title": {"text": "optimizer step"}, "range": [low, high], **ticks}


def depth_axis(run: Run, over: str, padding: float = 0.5) -> Figure:
    """The states 0 … L or blocks 0 … L−1 of one run."""
    last = run.depth if over == "state" else run.depth - 1
    spacing = next((gap for gap in (1, 2, 4, 8, 16, 32, 64) if last / gap <= 9), 128)
    title = "depth: state <i>l</i>" if over == "state" else "depth: block <i>l</i>"
    return {"title": {"text": title}, "range": [-padding, last + padding], "tick0": 0, "dtick": spacing}


def _axis_title(title: str) -> str:
    """`V_loc` and `V_glob` with their subscripts, all else as it is."""
    return plotly_text(title).replace("V_loc", "V<sub>loc</sub>").replace("V_glob", "V<sub>glob</sub>")
