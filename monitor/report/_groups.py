"""What sections are made of: panels that share their scales, in groups with one legend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from repflow.monitor.report._alerts import marked
from repflow.monitor.report._axes import Figure, Floats, value_axis
from repflow.monitor.report._figures import depth_curves, step_curves
from repflow.monitor.report._frame_figures import depth_overlay
from repflow.monitor.report._html import color_legend, frame_legend, kinds_legend, order_legend
from repflow.monitor.report._runs import Run
from repflow.monitor.report._thin import HEATMAP_COLUMNS, spread

CURVES_OVER_DEPTH = 5


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure with a heading."""

    title: str
    """Plain text."""
    figure: Figure
    """Data and layout for Plotly."""
    detail: str = ""
    """Plain text after the title, in lighter type."""
    run: Run | None = None
    """The run, where the panel shows one alone."""
    follows: bool = False
    """Whether the figure follows the slider; the page then says which step it shows."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Panels that share their scales, with one legend."""

    name: str
    """What the panels have in common beside the section's quantity, plain text."""
    legend: str
    """HTML."""
    panels: Sequence[Panel]
    """In the order of the runs, or of the quantities."""
    note: str = ""
    """HTML below the legend: what was left out."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One quantity, or several that are read together."""

    id: str
    """Anchor in the page."""
    title: str
    """Plain text."""
    text: str
    """How to read it, HTML."""
    short: str = ""
    """The title in the list of sections, where it is another one."""
    groups: Sequence[Group]
    """Below the text."""
    defines: Sequence[str] = ()
    """Names of the quantities whose definitions stand between text and groups."""
    extra: str = ""
    """HTML below the groups."""


def heatmaps(
    runs: Sequence[Run],
    figures: Sequence[Figure],
    values: Sequence[Floats],
    colors: tuple[float, float],
    label: str,
    *,
    maxima: bool = False,
    clipped: bool = False,
) -> Group:
    """One depth × step heatmap per run; `clipped` if values below the range of colours are shown in its first one."""
    panels = [
        Panel(
            title=run.label,
            detail="" if np.isfinite(part).any() else "not measured",
            figure=marked(figure, [run]),
            run=run,
        )
        for run, figure, part in zip(runs, figures, values, strict=True)
    ]
    legend = color_legend(colors, label[:1].upper() + label[1:], clipped=clipped) + kinds_legend(runs)
    return Group(
        name="depth by step",
        legend=legend,
        panels=panels,
        note=thinned(runs, HEATMAP_COLUMNS, "columns", maxima=maxima),
    )


def curves_over_depth(
    runs: Sequence[Run],
    values_of: Callable[[Run], Floats],
    *,
    over: str,
    label: str,
    axis: Figure,
    unit: str = "",
) -> Group:
    """Per run, the curves of a few snapshots over states or blocks."""
    panels = [
        Panel(
            title=run.label,
            detail=f"{'steps' if len(run.steps) > 1 else 'step'} {_listed(run)}",
            figure=depth_curves(
                run, values_of(run), over=over, label=label, unit=unit, y_axis=axis, chosen=chosen(run)
            ),
            run=run,
        )
        for run in runs
    ]
    return Group(name="curves over depth", legend=order_legend() + kinds_legend(runs), panels=panels)


def compared_over_depth(
    runs: Sequence[Run],
    baselines: Sequence[Run],
    name: str,
    *,
    over: str,
    label: str,
    axis: Figure,
    unit: str = "",
    note: str = "",
) -> Group:
    """The curves of each run over depth, behind one figure of all runs at the chosen step."""
    curves = curves_over_depth(runs, lambda run: run.values(name), over=over, label=label, axis=axis, unit=unit)
    overlay = depth_overlay(runs, baselines, name, over=over, label=label, unit=unit, y_axis=axis)
    title = "All runs" if len(runs) > 1 else "Chosen step"
    return Group(
        name=curves.name,
        legend=frame_legend(runs, baselines) + curves.legend,
        panels=[Panel(title=title, figure=overlay, follows=True), *curves.panels],
        note=note,
    )


def over_steps(
    runs: Sequence[Run],
    values_of: Callable[[Run], Floats],
    title: str,
    axis_title: str,
    steps: tuple[float, float],
    *,
    unit: str = "",
    bounds: tuple[float, float] | None = None,
    reduce: str = "pick",
    series: str = "",
) -> Panel:
    """One value per snapshot of all runs over steps; `series` is what the comparison of runs finds it by."""
    axis = value_axis(axis_title, [values_of(run) for run in runs], bounds=bounds)
    figure = step_curves(runs, values_of, label=title, unit=unit, y_axis=axis, step_range=steps, reduce=reduce)
    return Panel(title=title, figure=marked({**figure, "series": series}, runs))


def chosen(run: Run) -> list[int]:
    return spread(len(run.steps), CURVES_OVER_DEPTH).tolist()


def _listed(run: Run) -> str:
    return " · ".join(f"{step:,}" for step in run.steps[chosen(run)])


def thinned(runs: Sequence[Run], limit: int, what: str, *, maxima: bool = False) -> str:
    """Says of which runs not every snapshot is shown."""
    cut = [run for run in runs if len(run.steps) > limit]
    if not cut:
        return ""
    how = "each the largest value since the one before" if maxima else "evenly spaced, first and last included"
    counts = {len(run.steps) for run in cut}
    if len(cut) == len(runs) and len(counts) == 1:
        which = f"of {counts.pop():,} snapshots"
    else:
        which = ", ".join(f"of {len(run.steps):,} snapshots of {escape(run.label)}" for run in cut)
    return f"Shown are {limit:,} {what} {which}, {how}."
