"""Plotly figures of runs, as plain JSON-able dicts.

Panels of several runs share the scales that are passed in. A panel always spans its run's whole depth, so that equal
places are equal relative depths, whatever the number of blocks. Figures carry no legend, no title and no colours of
the page: HTML does that around them, and the page's script sets the theme.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from repflow.monitor.report._axes import Figure, Floats, column_width, depth_axis, plotly_text, step_axis
from repflow.monitor.report._kinds import add_kind_strip
from repflow.monitor.report._runs import Run
from repflow.monitor.report._thin import CURVE_POINTS, HEATMAP_COLUMNS, bin_maxima, rounded, spread

COLORSCALE = "Viridis"
MARKED_DEPTH = 32
"""Deeper models get no markers on curves over depth."""
MARKED_POINTS = 60
"""Longer curves over steps get no markers."""


def depth_heatmap(
    run: Run,
    values: Floats,
    *,
    over: str,
    label: str,
    color_range: tuple[float, float],
    step_range: tuple[float, float],
    reduce: str = "pick",
) -> Figure:
    """Depth × step of values [n, states or blocks] (`over` says which): at most `HEATMAP_COLUMNS` snapshots.

    `reduce="pick"` shows single snapshots, `reduce="max"` the largest value since the column before. Where nothing was
    measured for longer than usual, empty columns keep the others from being painted over the gap.
    """
    kept = spread(len(run.steps), HEATMAP_COLUMNS)
    columns = values[kept] if reduce == "pick" else bin_maxima(values, HEATMAP_COLUMNS)
    width = column_width(run.steps, step_range[1] - step_range[0])
    steps, columns = with_gaps(run.steps[kept], columns, width)
    trace = {
        "type": "heatmap",
        "x": steps.tolist(),
        "y": list(range(columns.shape[1])),
        "z": rounded(columns.T),
        "meta": {"rows": depth_labels(run, over)},
        "zmin": color_range[0],
        "zmax": color_range[1],
        "colorscale": COLORSCALE,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": f"step %{{x}}<br>%{{customdata}}<br>{label} %{{z:.4~g}}<extra></extra>",
    }
    plain = layout(step_axis(step_range), depth_axis(run, over), gaps=True, right=24)
    add_kind_strip(plain, run, over, along="y")
    return {"data": [trace], "layout": plain}


def depth_curves(
    run: Run, values: Floats, *, over: str, label: str, unit: str, y_axis: Figure, chosen: Sequence[int]
) -> Figure:
    """Values [n, states or blocks] at the chosen snapshots, from pale to strong, block kinds in a strip above."""
    labels = depth_labels(run, over)
    traces = []
    for place, index in enumerate(chosen):
        last = place == len(chosen) - 1
        traces.append(
            {
                "type": "scatter",
                "x": list(range(len(labels))),
                "y": rounded(values[index]),
                "mode": line_mode(values[index], MARKED_DEPTH + 1),
                "line": {"color": run.color, "width": 2.6 if last else 1.5, "dash": _chosen_dash(place, last)},
                "marker": {"size": 5 if last else 3},
                "opacity": 1.0 if last else 0.5 + 0.35 * place / len(chosen),
                "customdata": labels,
                "name": f"step {run.steps[index]}",
                "hovertemplate": f"step {run.steps[index]}<br>%{{customdata}}"
                f"<br>{label} %{{y:.4~g}}{unit}<extra></extra>",
            }
        )
    plain = layout(depth_axis(run, over, padding=0.3 if over == "state" else 0.5), y_axis, top=26, height=270)
    add_kind_strip(plain, run, over, along="x")
    return {"data": traces, "layout": plain}


def step_curves(
    runs: Sequence[Run],
    values_of: Callable[[Run], Floats],
    *,
    label: str,
    unit: str,
    y_axis: Figure,
    step_range: tuple[float, float],
    reduce: str = "pick",
) -> Figure:
    """One value per snapshot [n] of all runs over steps, at most `CURVE_POINTS`; `reduce` as in `depth_heatmap`."""
    traces = []
    for run in runs:
        kept = spread(len(run.steps), CURVE_POINTS)
        values = values_of(run)
        points = values[kept] if reduce == "pick" else bin_maxima(values, CURVE_POINTS)
        traces.append(
            {
                **run_line(run, line_mode(points, MARKED_POINTS)),
                "x": run.steps[kept].tolist(),
                "y": rounded(points, digits=5),
                # The label may come from a run file: not in the template, where `%{` has a meaning.
                "meta": {"label": plotly_text(label), "unit": unit, "run": run.index},
                "hovertemplate": "%{fullData.name}<br>step %{x}<br>%{meta.label} %{y:.5~g}%{meta.unit}<extra></extra>",
            }
        )
    return {"data": traces, "layout": layout(step_axis(step_range), y_axis)}


def with_gaps(steps: NDArray[np.int64], columns: Floats, width: int) -> tuple[NDArray[np.int64], Floats]:
    """Columns of NaN beside those next to a gap of two `width`s or more, and on both sides of a single one.

    Plotly draws the border of two columns halfway between them: one next to a column of NaN is `width` steps wide.
    """
    if len(steps) == 1:
        before, after = steps, steps
    else:
        wide = np.diff(steps) >= 2 * width
        before, after = steps[:-1][wide], steps[1:][wide]
    empty = np.full((2 * len(before), columns.shape[1]), np.nan)
    # A gap of two widths gets one column for both its sides.
    places, kept = np.unique(np.concatenate([steps, before + width, after - width]), return_index=True)
    return places, np.concatenate([columns, empty])[kept]


def _chosen_dash(place: int, last: bool) -> str:
    """The first of several snapshots is dotted, the others are solid."""
    return "dot" if place == 0 and not last else "solid"


def run_line(run: Run, mode: str) -> Figure:
    """A curve in the run's colour and line style."""
    return {
        "type": "scatter",
        "name": plotly_text(run.label),
        "mode": mode,
        "line": {"color": run.color, "width": 2, "dash": run.dash},
        "marker": {"size": 4},
    }


def line_mode(points: Floats, most_marked: int) -> str:
    """With markers where there are few points, or some that have no neighbour to draw a line to."""
    known = np.concatenate([[False], np.isfinite(points), [False]])
    lone = known[1:-1] & ~known[:-2] & ~known[2:]
    return "lines+markers" if len(points) <= most_marked or lone.any() else "lines"


def layout(
    x_axis: Figure, y_axis: Figure, *, gaps: bool = False, top: int = 10, right: int = 18, height: int = 250
) -> Figure:
    """What all figures have. `meta.gaps`: the plot's background is what shows where values are missing."""
    return {
        "xaxis": x_axis,
        "yaxis": y_axis,
        "height": height,
        "margin": {"l": 58, "r": right, "t": top, "b": 44},
        "showlegend": False,
        "hovermode": "closest",
        "meta": {"gaps": gaps},
    }


def depth_labels(run: Run, over: str) -> list[str]:
    """What hovering calls each state or block."""
    blocks = [
        f"block {index}<br>{plotly_text(kind)}, {plotly_text(name)}"
        for index, (kind, name) in enumerate(zip(run.kinds, run.block_names, strict=True))
    ]
    if over == "block":
        return blocks
    return ["state 0<br>input of block 0", *(f"state {index + 1}, after {block}" for index, block in enumerate(blocks))]
