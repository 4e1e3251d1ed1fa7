"""One self-contained HTML page out of sections."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from repflow.monitor.report import _text
from repflow.monitor.report._groups import Group, Panel, Section
from repflow.monitor.report._html import run_mark
from repflow.monitor.report._overview import differences, run_card, summary_table
from repflow.monitor.report._runs import Run
from repflow.monitor.report._sections import build_sections


def render_page(runs: Sequence[Run]) -> str:
    """The whole page. Runs without snapshots appear in the header alone."""
    measured = [run for run in runs if len(run.steps)]
    sections = build_sections(measured) if measured else []
    figures: list[dict[str, Any]] = []
    body = "".join(_section(section, figures) for section in sections)
    data = script_json(figures)
    plotly_js = get_plotlyjs()
    kilobytes = (len(body.encode()) + len(data)) / 1000
    return Template(_asset("page.html")).substitute(
        title=escape(", ".join(run.label for run in runs)),
        css=_asset("page.css"),
        intro=_text.PAGE,
        warnings="".join(f'<p class="warning">{text}</p>' for text in _warnings(runs)),
        cards="".join(run_card(run) for run in runs),
        summary=_text.SUMMARY + summary_table(measured) if measured else "",
        contents=_contents(sections),
        sections=body,
        size=f"{kilobytes:,.0f} kB of data and {len(plotly_js) / 1e6:.1f} MB of plotly.js",
        data=data,
        plotly=plotly_js,
        script=_asset("page.js"),
    )


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, nor start a comment there."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return (files("repflow.monitor.report") / name).read_text(encoding="utf-8")


def _warnings(runs: Sequence[Run]) -> list[str]:
    empty = [run.label for run in runs if not len(run.steps)]
    missing = [f"No snapshot has been written yet by: {escape(', '.join(empty))}."] if empty else []
    damaged = [f"{escape(run.label)}: {escape(text)}" for run in runs for text in run.warnings]
    return missing + damaged + differences([run for run in runs if len(run.steps)])


def _contents(sections: Iterable[Section]) -> str:
    links = (f'<a href="#{section.id}">{_title(section.title)}</a>' for section in sections)
    return "".join(links)


def _title(title: str) -> str:
    """Plain text as HTML, `V_loc` with its subscript."""
    return escape(title).replace("V_loc", "V<sub>loc</sub>").replace("V_glob", "V<sub>glob</sub>")


def _section(section: Section, figures: list[dict[str, Any]]) -> str:
    groups = "".join(_group(section, group, figures) for group in section.groups)
    return f'<section id="{section.id}"><h2>{_title(section.title)}</h2>{section.text}{groups}{section.extra}</section>'


def _group(section: Section, group: Group, figures: list[dict[str, Any]]) -> str:
    slider = _slider(group.slider) if group.slider else ""
    note = f'<p class="note">{group.note}</p>' if group.note else ""
    title = f"{section.title}, {group.name}"
    panels = "".join(_panel(title, panel, figures) for panel in group.panels)
    return f'<div class="legends">{group.legend}</div>{note}{slider}<div class="panels">{panels}</div>'


def _slider(steps: Sequence[int]) -> str:
    """A range input over the indices of `steps`, standing at the last one."""
    last = len(steps) - 1
    return (
        '<p class="slider"><label for="cka-slider">Training step</label>'
        f'<input type="range" id="cka-slider" min="0" max="{last}" value="{last}" step="1" '
        f'data-steps="{escape(json.dumps(list(steps)))}">'
        '<output for="cka-slider" id="cka-step" aria-live="polite"></output>'
        "<small>Each run shows its nearest step. Arrow keys move the slider.</small></p>"
    )


def _panel(title: str, panel: Panel, figures: list[dict[str, Any]]) -> str:
    """The place of a figure, whose data goes to `figures` under the same number."""
    number = len(figures)
    figures.append(panel.figure)
    mark = run_mark(panel.run) if panel.run else ""
    label = escape(f"{title}: {panel.title}")
    detail = f" <small>{escape(panel.detail)}</small>" if panel.detail else ""
    shown = ' <output class="shown"></output>' if "cka" in panel.figure else ""
    height = panel.figure["layout"]["height"]
    return (
        f"<figure><figcaption>{mark}<span>{_title(panel.title)}{detail}{shown}</span></figcaption>"
        f'<div class="plot" role="img" aria-label="{label}" data-figure="{number}" style="height:{height}px"></div>'
        "</figure>"
    )
