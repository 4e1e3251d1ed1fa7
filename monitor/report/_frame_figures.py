"""Figures of the chosen step: frames, which the page's script fills from `_frames` as the slider moves.

`figure["frame"]` tells the script what belongs into the figure, `figure["compare"]` what of two runs. A trace with a
`run` in its `meta` gets the values of that run; one without keeps its own.
"""

from collections.abc import Sequence

import numpy as np

from repflow.monitor.report._axes import Figure, depth_axis
from repflow.monitor.report._figures import COLORSCALE, MARKED_DEPTH, depth_labels, layout, line_mode, run_line
from repflow.monitor.report._kinds import add_kind_strip
from repflow.monitor.report._runs import Run
from repflow.monitor.report._thin import rounded

DIVERGING = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]]
"""Blue below zero, white at it, red above (ColorBrewer's RdBu, which colour-blind readers tell apart)."""
_RELATIVE_DEPTH = {"title": {"text": "relative depth <i>l</i> / <i>L</i>"}, "range": [-0.02, 1.02], "dtick": 0.25}
_POSITIONS = {"title": {"text": "position in sequence"}, "range": [1, 0], "tickvals": [0, 0.25, 0.5, 0.75, 1]}


def cka_matrix(run: Run, color_range: tuple[float, float]) -> Figure:
    """CKA of every pair of states of the chosen step."""
    trace = _matrix(run, "state", color_range)
    trace["hovertemplate"] = "%{customdata}<br>compared with state %{x}<br>CKA %{z:.4~g}<extra></extra>"
    vertical = {**depth_axis(run, "state"), "scaleanchor": "x", "constrain": "domain"}
    horizontal = {**depth_axis(run, "state"), "constrain": "domain"}
    plain = layout(horizontal, vertical, gaps=True, right=24, height=310)
    add_kind_strip(plain, run, "state", along="y")
    return {"data": [trace], "layout": plain, "frame": {"what": "cka", "run": run.index}}


def token_map(run: Run, color_range: tuple[float, float]) -> Figure:
    """Adjacent cosine of the chosen step, relative position × block: the paper's Figure 1."""
    trace = _matrix(run, "block", color_range)
    trace["hovertemplate"] = "%{customdata}<br>position %{y:.2f} of the sequence<br>cosine %{z:.4~g}<extra></extra>"
    plain = layout(depth_axis(run, "block"), {**_POSITIONS}, gaps=True, top=26, height=290)
    add_kind_strip(plain, run, "block", along="x")
    return {"data": [trace], "layout": plain, "frame": {"what": "tokens", "run": run.index}}


def _matrix(run: Run, over: str, color_range: tuple[float, float]) -> Figure:
    along = "rows" if over == "state" else "columns"
    return {
        "type": "heatmap",
        "x": list(range(run.depth + (over == "state"))),
        "z": [],
        "meta": {along: depth_labels(run, over)},
        "zmin": color_range[0],
        "zmax": color_range[1],
        "colorscale": COLORSCALE,
        "showscale": False,
        "hoverongaps": False,
    }


def depth_overlay(
    runs: Sequence[Run], baselines: Sequence[Run], name: str, *, over: str, label: str, unit: str, y_axis: Figure
) -> Figure:
    """All runs at the chosen step over depth; dotted before the first update, and grey baselines, at their first.

    Over states or blocks where all have the same number; else over relative depth, from 0, the input of block 0, to 1.
    """
    alike = len({run.depth for run in (*runs, *baselines)}) == 1
    traces = []
    for run in (*baselines, *runs):
        labels = depth_labels(run, over)
        places = np.arange(len(labels)) + (0.0 if alike or over == "state" else 0.5)
        base = {
            **run_line(run, "lines"),
            "x": rounded(places if alike else places / max(run.depth, 1)),
            "customdata": labels,
        }
        template = (
            f"%{{fullData.name}}, step %{{meta.step}}<br>%{{customdata}}<br>{label} %{{y:.5~g}}{unit}<extra></extra>"
        )
        if run.baseline or run.untrained:
            first = run.values(name)[0]
            line = {**base["line"], "dash": "longdash" if run.baseline else "dot", "width": 1.5}
            meta = {"step": int(run.steps[0])}
            traces.append({**base, "y": rounded(first), "line": line, "meta": meta, "hovertemplate": template})
        if not run.baseline:
            mode = line_mode(run.values(name)[-1], MARKED_DEPTH + 1)
            traces.append({**base, "mode": mode, "y": [], "meta": {"run": run.index}, "hovertemplate": template})
    axis = depth_axis(runs[0], over, padding=0.3) if alike else _RELATIVE_DEPTH
    return {
        "data": traces,
        "layout": layout(axis, y_axis, top=26, height=270),
        "frame": {"what": "curves", "name": name},
    }


def quantile_bars(run: Run, name: str, *, label: str, unit: str, y_axis: Figure) -> Figure:
    """Median, middle half and middle nine tenths of a state-space quantity by block, at the chosen step."""
    base = {
        "type": "scatter",
        "mode": "markers",
        "x": list(range(run.depth)),
        "y": [],
        "customdata": depth_labels(run, "block"),
    }
    bar = {"type": "data", "symmetric": False, "array": [], "arrayminus": [], "width": 0, "color": run.color}
    thin = {
        **base,
        "error_y": {**bar, "thickness": 1.5},
        "marker": {"size": 1, "color": run.color},
        "hoverinfo": "skip",
    }
    thick = {
        **base,
        "error_y": {**bar, "thickness": 6},
        "marker": {"size": 8, "color": run.color, "line": {"width": 1.5}},
        "hovertemplate": f"%{{customdata}}<br>{label}: median %{{y:.4~g}}{unit}<br>%{{text}}<extra></extra>",
        "meta": {"unit": unit},
    }
    plain = layout(depth_axis(run, "block"), y_axis, top=26, height=270)
    add_kind_strip(plain, run, "block", along="x")
    return {"data": [thin, thick], "layout": plain, "frame": {"what": "quantiles", "run": run.index, "name": name}}


def compared_curves(title: str, **compare: str) -> Figure:
    """Frame of a difference of curves; the script knows the runs, and so the axes."""
    trace = {"type": "scatter", "mode": "lines+markers", "x": [], "y": [], "marker": {"size": 4}}
    y_axis = {"title": {"text": title}, "zeroline": True, "exponentformat": "e", "automargin": True}
    return {"data": [trace], "layout": layout({"title": {"text": ""}}, y_axis), "compare": compare}


def compared_matrix(what: str, height: int) -> Figure:
    """Frame of a difference of matrices, with a colour scale of its own."""
    trace = {
        "type": "heatmap",
        "x": [],
        "z": [],
        "meta": {},
        "zmin": -1,
        "zmax": 1,
        "colorscale": DIVERGING,
        "colorbar": {"thickness": 12, "outlinewidth": 0, "title": {"text": "A − B", "side": "right"}},
        "hoverongaps": False,
    }
    states = {"title": {"text": "depth: state <i>l</i>"}}
    square = {"constrain": "domain"}
    if what == "cka":
        axes = {**states, **square}, {**states, **square, "scaleanchor": "x"}
    else:
        axes = {"title": {"text": "depth: block <i>l</i>"}}, {**_POSITIONS}
    return {"data": [trace], "layout": layout(*axes, gaps=True, right=8, height=height), "compare": {"what": what}}
