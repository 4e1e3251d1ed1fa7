"""Small pieces of HTML. Whatever comes from a run file passes `escape` here or before."""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from repflow.monitor.report._definitions import DEFINITIONS, Definition, definition_rows
from repflow.monitor.report._kinds import KIND_COLORS, OTHER_KIND_COLOR, kind_letter
from repflow.monitor.report._runs import Run


def math_text(title: str) -> str:
    """Plain text as HTML, `V_loc` and `V_glob` with their subscripts."""
    return escape(title).replace("V_loc", "V<sub>loc</sub>").replace("V_glob", "V<sub>glob</sub>")


def definitions(names: Iterable[str]) -> str:
    """The definitions of quantities, each behind a button of its own."""
    return f'<div class="definitions">{"".join(_definition(name, DEFINITIONS[name]) for name in names)}</div>'


def _definition(name: str, definition: Definition) -> str:
    rows = "".join(
        f"<dt>{label}</dt><dd>{text.replace('V_loc', 'V<sub>loc</sub>').replace('V_glob', 'V<sub>glob</sub>')}</dd>"
        for label, text in definition_rows(definition)
    )
    return (
        f'<details id="define-{name}"><summary><span>Definition</span>: {math_text(definition.title)}</summary>'
        f"<dl>{rows}</dl></details>"
    )


def number(value: float, digits: int = 3) -> str:
    """A value for reading, with a true minus sign and thousands separators."""
    if not np.isfinite(value):
        return "n/a"
    text = f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def run_name(run: Run) -> str:
    """The run's name behind its line style."""
    return f'<span class="run">{run_mark(run)}<span>{escape(run.label)}</span></span>'


def run_mark(run: Run) -> str:
    """The run's line style: more runs than there are colours differ in their dashes."""
    return _line_sample(run.color, "longdash" if run.baseline else run.dash)


def swatch(color: str, letter: str = "") -> str:
    """A little square of a colour, with a letter in it."""
    return f'<span class="swatch" style="background:{color}" aria-hidden="true">{escape(letter)}</span>'


def kinds_legend(runs: Iterable[Run]) -> str:
    """The colours of the kinds of blocks that the runs have."""
    found = {kind for run in runs for kind in run.kinds}
    kinds = [kind for kind in KIND_COLORS if kind in found] + sorted(found - KIND_COLORS.keys())
    items = (
        f"<span>{swatch(KIND_COLORS.get(kind, OTHER_KIND_COLOR), kind_letter(kind))}{escape(kind)}</span>"
        for kind in kinds
    )
    return f'<span class="legend">Kind of block: {"".join(items)}</span>'


def runs_legend(runs: Iterable[Run]) -> str:
    """The line styles of the runs."""
    items = (f"<span>{run_mark(run)}<span>{escape(run.label)}</span></span>" for run in runs)
    return f'<span class="legend">{"".join(items)}</span>'


def frame_legend(runs: Iterable[Run], baselines: Iterable[Run]) -> str:
    """The line styles of the runs and of baselines."""
    items = [f"<span>{run_mark(run)}<span>{escape(run.label)}</span></span>" for run in runs]
    items += [f"<span>{run_mark(run)}<span>{escape(run.label)} (baseline)</span></span>" for run in baselines]
    return f'<span class="legend">{"".join(items)}</span>'


def order_legend() -> str:
    """How curves of one run at several steps differ."""
    first, between, last = (
        _line_sample("currentColor", dash, width, opacity)
        for dash, width, opacity in (("dot", 1.5, 0.6), ("solid", 1.5, 0.6), ("solid", 2.6, 1.0))
    )
    return (
        f'<span class="legend"><span>{first}first step</span><span>{between}in between, later is stronger</span>'
        f"<span>{last}last step</span></span>"
    )


def color_legend(color_range: tuple[float, float], label: str, *, clipped: bool = False) -> str:
    """The colour scale that all heatmaps of a group share, with five values, and the colour of what is missing.

    `clipped` if smaller values than the first have its colour.
    """
    texts = [f"{value:.3g}" for value in np.linspace(*color_range, 5)]
    if clipped:
        texts[0] = f"≤ {texts[0]}"
    ticks = "".join(f"<span>{text}</span>" for text in texts)
    return (
        f'<span class="legend"><span>{escape(label)}</span>'
        f'<span class="scale"><span class="ramp"></span><span class="ticks">{ticks}</span></span>'
        '<span><span class="swatch missing" aria-hidden="true"></span>not measured</span></span>'
    )


def table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML already, the first cell of a row its header; `name` is read out, not shown."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    # Focusable, so that a table that is too wide can be scrolled by keys.
    content = f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table>{content}</table></div>'


def _line_sample(color: str, dash: str, width: float = 2, opacity: float = 1.0) -> str:
    pattern = {"dash": "8 4", "dot": "2 3", "dashdot": "8 3 2 3", "longdash": "12 4"}.get(dash, "none")
    return (
        '<svg class="line" width="28" height="8" aria-hidden="true">'
        f'<path d="M0 4H28" stroke="{color}" stroke-width="{width}" stroke-dasharray="{pattern}" opacity="{opacity}"/>'
        "</svg>"
    )
