"""The alerts of runs: read from the run file, marked on the axes of steps, and listed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from textwrap import wrap
from typing import Any

import xarray as xr

from repflow.monitor.report._axes import Figure, plotly_text, step_axis
from repflow.monitor.report._html import run_name, table
from repflow.monitor.report._runs import Run

MAX_LISTED = 100
"""Most alerts in the page's list."""
SEVERITIES = {
    "error": ("diamond", "#dd4b4b", "◆"),
    "warning": ("triangle-down", "#d98200", "▼"),
    "info": ("circle", "#3b7dbf", "●"),
}
"""Marker, colour and sign of each severity, the worst first."""

_NEAR_TOP = 0.96
"""Place of a marker in a plot of height 1: within it, since Plotly answers to no pointer outside."""
_HOVER_WIDTH = 56
_ROW_HEIGHT = 34


@dataclass(frozen=True, kw_only=True)
class Alert:
    """What a failure signature found in a snapshot."""

    step: int
    """The snapshot's optimizer step."""
    signature: str
    """Name of the rule."""
    severity: str
    """`info`, `warning` or `error`."""
    title: str
    message: str
    """What was found, with its numbers."""
    suggestion: str
    """What to do."""
    states: tuple[int, ...]
    """States or blocks concerned."""


def alerts_of(data: xr.Dataset) -> list[Alert] | None:
    """The alerts of an opened run, by step; None if the file was written without a place for them."""
    stored = data.attrs.get("alerts")
    if stored is None:
        return None
    return sorted((_alert(raw) for raw in json.loads(stored)), key=lambda alert: alert.step)


def _alert(raw: Mapping[str, Any]) -> Alert:
    """What is stored of an alert, without what the page does not show."""
    known = {field.name: raw[field.name] for field in fields(Alert)}
    return Alert(**{**known, "states": tuple(raw["states"])})


def marked(figure: Figure, runs: Sequence[Run]) -> Figure:
    """`figure`, whose horizontal axis is of steps, with a marker at the top of the plot for each alert of the runs."""
    found = [(run, alert) for run in runs for alert in alerts_of(run.data) or ()]
    if not found:
        return figure
    trace = _markers(found, [_NEAR_TOP] * len(found)) | {"yaxis": "y2"}
    hidden = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}
    return {**figure, "data": [*figure["data"], trace], "layout": {**figure["layout"], "yaxis2": hidden}}


def timeline(runs: Sequence[Run], step_range: tuple[float, float]) -> Figure:
    """One row per run, one marker per alert."""
    rows = [(row, run, alert) for row, run in enumerate(runs) for alert in alerts_of(run.data) or ()]
    trace = _markers([(run, alert) for _, run, alert in rows], [float(row) for row, _, _ in rows])
    names = [plotly_text(run.label if len(run.label) <= 24 else f"{run.label[:23]}…") for run in runs]
    y_axis = {
        "title": {"text": ""},
        "range": [len(runs) - 0.5, -0.5],
        "tickvals": list(range(len(runs))),
        "ticktext": names,
        "automargin": True,
    }
    layout = {
        "xaxis": step_axis(step_range),
        "yaxis": y_axis,
        "height": 66 + _ROW_HEIGHT * len(runs),
        "margin": {"l": 58, "r": 18, "t": 10, "b": 44},
        "showlegend": False,
        "hovermode": "closest",
        "meta": {"gaps": False},
    }
    return {"data": [trace], "layout": layout}


def _markers(found: Sequence[tuple[Run, Alert]], heights: Sequence[float]) -> Figure:
    looks = [_look(alert) for _, alert in found]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [alert.step for _, alert in found],
        "y": list(heights),
        "cliponaxis": False,
        "marker": {
            "symbol": [symbol for symbol, _, _ in looks],
            "color": [color for _, color, _ in looks],
            "size": 11,
            "line": {"width": 1},
        },
        "customdata": [_hover(run, alert) for run, alert in found],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _look(alert: Alert) -> tuple[str, str, str]:
    return SEVERITIES.get(alert.severity, SEVERITIES["warning"])


def _hover(run: Run, alert: Alert) -> str:
    """Severity, title, message and suggestion, in lines that fit."""
    head = f"{alert.severity} in {run.label}, step {alert.step:,}"
    lines = [f"<b>{plotly_text(alert.title)}</b>", plotly_text(head)]
    for text in (alert.message, alert.suggestion):
        lines += [plotly_text(line) for line in wrap(text, _HOVER_WIDTH)]
    return "<br>".join(lines)


def alerts_table(runs: Sequence[Run]) -> str:
    """All alerts, the worst first, then by step."""
    order = list(SEVERITIES)
    found = [(run, alert) for run in runs for alert in alerts_of(run.data) or ()]
    found.sort(key=lambda pair: (order.index(pair[1].severity) if pair[1].severity in order else -1, pair[1].step))
    rows = [
        [
            _severity(alert),
            f"{alert.step:,}",
            run_name(run),
            f"<strong>{escape(alert.title)}</strong><br>{escape(alert.message)}<small>{escape(_where(alert))}</small>",
            escape(alert.suggestion),
        ]
        for run, alert in found[:MAX_LISTED]
    ]
    rest = len(found) - MAX_LISTED
    more = f'<p class="note">Left out of the list: {rest:,} more.</p>' if rest > 0 else ""
    return table("Alerts", ["severity", "step", "run", "what was found", "what to do"], rows) + more


def _where(alert: Alert) -> str:
    """The rule, by which it is configured, and the states or blocks that it names."""
    places = ", ".join(map(str, alert.states))
    return f"{alert.signature}; at {places}" if places else alert.signature


def _severity(alert: Alert) -> str:
    """By colour, sign and word."""
    _, color, sign = _look(alert)
    return (
        f'<span class="severity"><span style="color:{color}" aria-hidden="true">{sign}</span>'
        f"{escape(alert.severity)}</span>"
    )
