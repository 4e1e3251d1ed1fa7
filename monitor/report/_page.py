"""One self-contained HTML page out of sections."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from repflow.monitor.report import _text
from repflow.monitor.report._alerts import alerts_of, alerts_table, timeline
from repflow.monitor.report._axes import shown_steps
from repflow.monitor.report._frames import frames
from repflow.monitor.report._groups import Group, Panel, Section
from repflow.monitor.report._html import definitions, math_text, run_mark
from repflow.monitor.report._overview import differences, run_card, summary_table
from repflow.monitor.report._runs import Run
from repflow.monitor.report._sections import build_sections, slider_steps

_RUNS = Section(id="runs", title="Runs", text="", groups=())
_SCRIPTS = ("draw.js", "frames.js", "compare.js", "keys.js", "live.js", "page.js")


@dataclass(frozen=True, kw_only=True)
class Content:
    """All of a page that depends on the runs."""

    title: str
    """Plain text."""
    body: str
    """HTML."""
    data: str
    """JSON: figures by the id of their place in the body, and what the script fills those of the chosen step from."""


def render_content(runs: Sequence[Run], *, notices: Sequence[str] = ()) -> Content:
    """What the page shows. Runs without snapshots appear among the cards alone; `notices` are plain text."""
    measured = [run for run in runs if len(run.steps) and not run.baseline]
    baselines = [run for run in runs if len(run.steps) and run.baseline]
    sections = build_sections(measured, baselines) if measured else []
    sections = [section for section in (_alerts(measured), *sections) if section is not None]
    figures: dict[str, Any] = {}
    rendered = [_section(section, figures) for section in sections]
    # Alerts come before the runs, all else behind them.
    front = int(bool(sections) and sections[0].id == "alerts")
    body = Template(_asset("content.html")).substitute(
        warnings="".join(f'<p class="warning">{escape(text)}</p>' for text in notices)
        + "".join(f'<p class="warning">{text}</p>' for text in _warnings(runs)),
        slider=_slider(slider_steps(measured)) if measured else "",
        contents=_contents([*sections[:front], _RUNS, *sections[front:]]),
        alerts="".join(rendered[:front]),
        cards="".join(run_card(run) for run in runs),
        summary=_text.SUMMARY + summary_table(measured) if measured else "",
        sections="".join(rendered[front:]),
    )
    data = {"figures": figures, "runs": {run.index: frames(run) for run in measured}}
    return Content(title=", ".join(run.label for run in runs) or "no run yet", body=body, data=script_json(data))


def render_page(content: Content, *, version: str = "") -> str:
    """The whole page; with the `version` of its content one that asks its server for newer ones."""
    plotly_js = get_plotlyjs()
    kilobytes = (len(content.body.encode()) + len(content.data)) / 1000
    size = f"{kilobytes:,.0f} kB of data and {len(plotly_js) / 1e6:.1f} MB of plotly.js"
    return Template(_asset("page.html")).substitute(
        title=escape(content.title),
        theme=_asset("theme.js"),
        css=_asset("page.css"),
        connect="'self'" if version else "'none'",
        version=escape(version),
        intro=_text.PAGE,
        body=content.body,
        size="" if version else f"Everything on this page is in this one file: {size}.",
        data=content.data,
        plotly=plotly_js,
        script="\n".join(_asset(name) for name in _SCRIPTS),
    )


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, nor start a comment there."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _asset(name: str) -> str:
    return (files("repflow.monitor.report") / name).read_text(encoding="utf-8")


def _warnings(runs: Sequence[Run]) -> list[str]:
    empty = [run.label for run in runs if not len(run.steps)]
    missing = [f"No snapshot has been written yet by: {escape(', '.join(empty))}."] if empty else []
    damaged = [f"{escape(run.label)}: {escape(text)}" for run in runs for text in run.warnings]
    return missing + damaged + differences([run for run in runs if len(run.steps)])


def _alerts(runs: Sequence[Run]) -> Section | None:
    """The alerts, if the run files can hold any."""
    found = [alerts_of(run.data) for run in runs]
    if all(alerts is None for alerts in found):
        return None
    if not any(found):
        return Section(id="alerts", title="Alerts", text=_text.NO_ALERTS, groups=[])
    panel = Panel(title="Over steps", figure=timeline(runs, shown_steps(runs)))
    return Section(
        id="alerts",
        title="Alerts",
        text=_text.ALERTS,
        groups=[Group(name="over steps", legend="", panels=[panel])],
        extra=alerts_table(runs),
    )


def _contents(sections: Sequence[Section]) -> str:
    return "".join(f'<a href="#{section.id}">{math_text(section.short or section.title)}</a>' for section in sections)


def _section(section: Section, figures: dict[str, Any]) -> str:
    groups = "".join(_group(section, place, group, figures) for place, group in enumerate(section.groups))
    head = f"<h2>{math_text(section.title)}</h2>{section.text}{definitions(section.defines) if section.defines else ''}"
    return f'<section id="{section.id}">{head}{groups}{section.extra}</section>'


def _group(section: Section, place: int, group: Group, figures: dict[str, Any]) -> str:
    legend = f'<div class="legends">{group.legend}</div>' if group.legend else ""
    note = f'<p class="note">{group.note}</p>' if group.note else ""
    title = f"{section.title}, {group.name}"
    panels = "".join(
        _panel(f"{section.id}-{place}-{number}", title, panel, figures) for number, panel in enumerate(group.panels)
    )
    return f'<div class="group">{legend}{note}<div class="panels">{panels}</div></div>'


def _slider(steps: Sequence[int]) -> str:
    """A range input over the indices of `steps`, standing at the last one."""
    last = len(steps) - 1
    return (
        '<p class="slider"><label for="step">Training step</label>'
        f'<input type="range" id="step" min="0" max="{last}" value="{last}" step="1" '
        f'data-steps="{escape(json.dumps(list(steps)))}"><output for="step" id="shown-step" data-keep></output></p>'
    )


def _panel(identity: str, title: str, panel: Panel, figures: dict[str, Any]) -> str:
    """The place of a figure, whose data goes to `figures` under the same identity."""
    figures[identity] = panel.figure
    mark = run_mark(panel.run) if panel.run else ""
    label = escape(f"{title}: {panel.title}")
    detail = f" <small>{escape(panel.detail)}</small>" if panel.detail else ""
    shown = ' <output class="shown" data-keep></output>' if panel.follows else ""
    height = panel.figure["layout"]["height"]
    attributes = f'id="{identity}" tabindex="0" role="img" aria-label="{label}" style="height:{height}px"'
    return (
        f"<figure><figcaption>{mark}<span>{math_text(panel.title)}{detail}{shown}</span></figcaption>"
        f'<div class="plot" data-keep {attributes}></div>'
        "</figure>"
    )
