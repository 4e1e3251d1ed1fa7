"""Plotly figures of runs, as plain JSON-able dicts.

Panels of several runs share the scales that are passed in. A panel always spans its run's whole depth, so that equal
places are equal relative depths, whatever the number of blocks. Figures carry no legend, no title and no colours of
the page: HTML does that around them, and the page's script sets the theme.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from repflow.monitor.report._axes import Figure, Floats, column_width, depth_axis, plotly_text, step_axis
from repflow.monitor.report._runs import Run
from repflow.monitor.report._thin import CURVE_POINTS, HEATMAP_COLUMNS, bin_maxima, rounded, spread

COLORSCALE = "Viridis"
KIND_COLORS = {
    "attention": "#77aadd",
    "ssm": "#ee8866",
    "hybrid": "#eedd88",
    "recurrent": "#ffaabb",
    "mlp": "#99ddff",
    "moe": "#44bb99",
    "conv": "#bbcc33",
}
"""Fill of each kind of block (Paul Tol's light scheme: made to carry text, and safe for colour-blind readers)."""
OTHER_KIND_COLOR = "#c8c8c8"
KIND_LETTERS = {"moe": "E"}
"""Letter of a kind in the strip, where it is not the first one of its name."""

MAX_STRIP_LETTERS = 16
MARKED_DEPTH = 32
"""Deeper models get no markers on curves over depth and no lines between the blocks of the strip."""
MARKED_POINTS = 60
"""Longer curves over steps get no markers."""


def depth_heatmap(
    run: Run,
    name: str,
    *,
    over: str,
    label: str,
    color_range: tuple[float, float],
    step_range: tuple[float, float],
    reduce: str = "pick",
) -> Figure:
    """Depth × step of a variable over states or blocks (`over`): at most `HEATMAP_COLUMNS` snapshots.

    `reduce="pick"` shows single snapshots, `reduce="max"` the largest value since the column before. Where nothing was
    measured for longer than usual, empty columns keep the others from being painted over the gap.
    """
    kept = spread(len(run.steps), HEATMAP_COLUMNS)
    values = run.values(name)
    columns = values[kept] if reduce == "pick" else bin_maxima(values, HEATMAP_COLUMNS)
    width = column_width(run.steps, step_range[1] - step_range[0])
    steps, columns = with_gaps(run.steps[kept], columns, width)
    trace = {
        "type": "heatmap",
        "x": steps.tolist(),
        "y": list(range(columns.shape[1])),
        "z": rounded(columns.T),
        "meta": _depth_labels(run, over),
        "zmin": color_range[0],
        "zmax": color_range[1],
        "colorscale": COLORSCALE,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": f"step %{{x}}<br>%{{customdata}}<br>{label} %{{z:.4~g}}<extra></extra>",
    }
    layout = _layout(step_axis(step_range), depth_axis(run, over), gaps=True)
    layout["shapes"] = _kind_strip(run, over, along="y")
    return {"data": [trace], "layout": layout}


def cka_heatmap(run: Run, color_range: tuple[float, float]) -> Figure:
    """Frame of the CKA matrix, state × state; the page's script puts in the matrix of the chosen step."""
    labels = _depth_labels(run, "state")
    trace = {
        "type": "heatmap",
        "x": list(range(run.depth + 1)),
        "y": list(range(run.depth + 1)),
        "z": [],
        "meta": labels,
        "zmin": color_range[0],
        "zmax": color_range[1],
        "colorscale": COLORSCALE,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "%{customdata}<br>compared with state %{x}<br>CKA %{z:.3f}<extra></extra>",
    }
    vertical = {**depth_axis(run, "state"), "scaleanchor": "x", "constrain": "domain"}
    horizontal = {**depth_axis(run, "state"), "constrain": "domain"}
    return {"data": [trace], "layout": _layout(horizontal, vertical, gaps=True, height=310)}


def depth_curves(run: Run, name: str, *, label: str, y_axis: Figure, chosen: Sequence[int]) -> Figure:
    """A variable over states at the chosen snapshots, from pale to strong, block kinds in a strip above."""
    values = run.values(name)
    traces = []
    for place, index in enumerate(chosen):
        last = place == len(chosen) - 1
        traces.append(
            {
                "type": "scatter",
                "x": list(range(run.depth + 1)),
                "y": rounded(values[index]),
                "mode": _mode(values[index], MARKED_DEPTH + 1),
                "line": {"color": run.color, "width": 2.6 if last else 1.5, "dash": _chosen_dash(place, last)},
                "marker": {"size": 5 if last else 3},
                "opacity": 1.0 if last else 0.4 + 0.4 * place / len(chosen),
                "customdata": _depth_labels(run, "state"),
                "name": f"step {run.steps[index]}",
                "hovertemplate": f"step {run.steps[index]}<br>%{{customdata}}<br>{label} %{{y:.4~g}}<extra></extra>",
            }
        )
    layout = _layout(depth_axis(run, "state", padding=0.3), y_axis, top=26, height=270)
    layout["shapes"] = _kind_strip(run, "state", along="x")
    layout["annotations"] = _strip_letters(run)
    return {"data": traces, "layout": layout}


def depth_overlay(runs: Sequence[Run], name: str, *, over: str, label: str, y_axis: Figure) -> Figure:
    """The last snapshot of all runs over relative depth, 0 (input of block 0) … 1 (after the last block)."""
    traces = []
    for run in runs:
        values = run.values(name)[-1]
        offset = 0.0 if over == "state" else 0.5
        traces.append(
            {
                **_run_line(run, _mode(values, MARKED_DEPTH + 1)),
                "x": rounded((np.arange(len(values)) + offset) / max(run.depth, 1)),
                "y": rounded(values),
                "customdata": _depth_labels(run, over),
                "hovertemplate": f"%{{fullData.name}}, step {run.steps[-1]}<br>%{{customdata}}"
                f"<br>{label} %{{y:.5~g}}<extra></extra>",
            }
        )
    axis = {"title": {"text": "relative depth <i>l</i> / <i>L</i>"}, "range": [-0.02, 1.02], "dtick": 0.25}
    return {"data": traces, "layout": _layout(axis, y_axis)}


def step_curves(
    runs: Sequence[Run],
    values_of: Callable[[Run], Floats],
    *,
    label: str,
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
                **_run_line(run, _mode(points, MARKED_POINTS)),
                "x": run.steps[kept].tolist(),
                "y": rounded(points, digits=5),
                # The label may come from a run file: not in the template, where `%{` has a meaning.
                "meta": plotly_text(label),
                "hovertemplate": "%{fullData.name}<br>step %{x}<br>%{meta} %{y:.5~g}<extra></extra>",
            }
        )
    return {"data": traces, "layout": _layout(step_axis(step_range), y_axis)}


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


def kind_letter(kind: str) -> str:
    """The letter that stands for a kind of block."""
    return KIND_LETTERS.get(kind, kind[:1].upper())


def _chosen_dash(place: int, last: bool) -> str:
    """The first of several snapshots is dotted, the others are solid."""
    return "dot" if place == 0 and not last else "solid"


def _run_line(run: Run, mode: str) -> Figure:
    return {
        "type": "scatter",
        "name": plotly_text(run.label),
        "mode": mode,
        "line": {"color": run.color, "width": 2, "dash": run.dash},
        "marker": {"size": 4},
    }


def _mode(points: Floats, most_marked: int) -> str:
    """With markers where there are few points, or some that have no neighbour to draw a line to."""
    known = np.concatenate([[False], np.isfinite(points), [False]])
    lone = known[1:-1] & ~known[:-2] & ~known[2:]
    return "lines+markers" if len(points) <= most_marked or lone.any() else "lines"


def _layout(x_axis: Figure, y_axis: Figure, *, gaps: bool = False, top: int = 10, height: int = 250) -> Figure:
    """`meta.gaps` tells the script that the plot's background is what shows where values are missing."""
    return {
        "xaxis": x_axis,
        "yaxis": y_axis,
        "height": height,
        "margin": {"l": 58, "r": 18, "t": top, "b": 44},
        "showlegend": False,
        "hovermode": "closest",
        "meta": {"gaps": gaps},
    }


def _depth_labels(run: Run, over: str) -> list[str]:
    """What hovering calls each state or block."""
    blocks = [
        f"block {index}<br>{plotly_text(kind)}, {plotly_text(name)}"
        for index, (kind, name) in enumerate(zip(run.kinds, run.block_names, strict=True))
    ]
    if over == "block":
        return blocks
    return ["state 0<br>input of block 0", *(f"state {index + 1}, after {block}" for index, block in enumerate(blocks))]


def _kind_strip(run: Run, over: str, *, along: str) -> list[Figure]:
    """A strip beside the plot, coloured by kind: block l lies between states l and l + 1, or at block l."""
    across = "y" if along == "x" else "x"
    start = 0.0 if over == "state" else -0.5
    inner, outer = (1.02, 1.08) if along == "x" else (1.008, 1.03)
    return [
        {
            "type": "rect",
            f"{along}ref": along,
            f"{across}ref": "paper",
            f"{along}0": start + index,
            f"{along}1": start + index + 1,
            f"{across}0": inner,
            f"{across}1": outer,
            "fillcolor": KIND_COLORS.get(kind, OTHER_KIND_COLOR),
            "line": {"width": 0.5 if run.depth <= MARKED_DEPTH else 0},
        }
        for index, kind in enumerate(run.kinds)
    ]


def _strip_letters(run: Run) -> list[Figure]:
    """The letter of every block's kind, in the strip above, where there is room."""
    if run.depth > MAX_STRIP_LETTERS:
        return []
    return [
        {
            "x": index + 0.5,
            "y": 1.05,
            "xref": "x",
            "yref": "paper",
            "yanchor": "middle",
            "text": plotly_text(kind_letter(kind)),
            "showarrow": False,
            "font": {"size": 9, "color": "#1c2126"},
        }
        for index, kind in enumerate(run.kinds)
    ]
