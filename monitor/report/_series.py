"""Sections of values of the whole stream, over steps, and of norms and health."""

from collections.abc import Callable, Sequence
from html import escape

from repflow.monitor.report import _text
from repflow.monitor.report._axes import Floats, value_axis
from repflow.monitor.report._figures import depth_heatmap
from repflow.monitor.report._frames import frame_indices
from repflow.monitor.report._groups import Group, Section, compared_over_depth, heatmaps, over_steps, thinned
from repflow.monitor.report._html import runs_legend
from repflow.monitor.report._overview import health_table
from repflow.monitor.report._runs import Run
from repflow.monitor.report._thin import CURVE_POINTS

MAX_SCALARS = 8

_STREAM_UNITS = " stream units"


def variation_section(runs: Sequence[Run], steps: tuple[float, float]) -> Section:
    """V_loc and V_glob, as they are and relative to the scale of the stream."""
    names = {
        "v_loc": ("V_loc", _STREAM_UNITS),
        "v_glob": ("V_glob", _STREAM_UNITS),
        "v_loc_rel": ("V_loc / RMS", ""),
        "v_glob_rel": ("V_glob / RMS", ""),
    }
    panels = [
        over_steps(
            runs,
            lambda run, name=name: run.values(name),
            title,
            f"{title},{unit}" if unit else title,
            steps,
            unit=unit,
            series=name,
        )
        for name, (title, unit) in names.items()
    ]
    note = thinned(runs, CURVE_POINTS, "points")
    return Section(
        id="variation",
        title="Layer variation: V_loc and V_glob",
        short="V_loc, V_glob",
        text=_text.VARIATION,
        defines=list(names),
        groups=[Group(name="over steps", legend=runs_legend(runs), panels=panels, note=note)],
    )


def norms_section(runs: Sequence[Run], baselines: Sequence[Run]) -> Section:
    """L2 norms over depth."""
    shown = [*(run.values("norms")[frame_indices(run)] for run in runs), *(run.values("norms")[0] for run in baselines)]
    axis = value_axis("L2 norm, stream units", [part.ravel() for part in shown])
    curves = compared_over_depth(runs, baselines, "norms", over="state", label="L2 norm", axis=axis, unit=_STREAM_UNITS)
    return Section(id="norms", title="Norms", text=_text.NORMS, defines=["norms"], groups=[curves])


def scalars_section(runs: Sequence[Run], steps: tuple[float, float]) -> Section | None:
    """What the training loop logged, if anything: the loss first."""
    names = list(dict.fromkeys(name for run in runs for name in run.scalars))
    if not names:
        return None
    panels = [
        over_steps(
            [run for run in runs if name in run.data],
            lambda run, name=name: run.values(name),
            name,
            name,
            steps,
            series=name,
        )
        for name in names[:MAX_SCALARS]
    ]
    note = thinned(runs, CURVE_POINTS, "points")
    if len(names) > MAX_SCALARS:
        note += f" Left out: {escape(', '.join(names[MAX_SCALARS:]))}."
    return Section(
        id="loss",
        title="Loss" if names == ["loss"] else "Loss and other logged values",
        text=_text.SCALARS,
        groups=[Group(name="over steps", legend=runs_legend(runs), panels=panels, note=note)],
    )


def health_section(runs: Sequence[Run], steps: tuple[float, float]) -> Section:
    """Tokens that could not be measured, tokens that decide CKA, and what the monitor costs."""
    values = [run.values("hsic_top_token") for run in runs]
    colors = (0.0, 1.0)
    label = "share of one token"
    maps = [
        depth_heatmap(run, part, over="state", label=label, color_range=colors, step_range=steps, reduce="max")
        for run, part in zip(runs, values, strict=True)
    ]
    series: list[tuple[str, str, str, Callable[[Run], Floats]]] = [
        ("Non-finite tokens", "tokens, worst state", " tokens", lambda run: run.values("nonfinite").max(axis=1)),
        ("Zero tokens", "tokens, worst state", " tokens", lambda run: run.values("zero").max(axis=1)),
        ("Monitor overhead", "milliseconds", " ms", lambda run: run.values("overhead_ms")),
    ]
    # A count that is zero throughout is said in the table; a flat line would add nothing.
    curves = [
        over_steps(runs, values_of, title, axis, steps, unit=unit, bounds=(0.0, 1.0), reduce="max")
        for title, axis, unit, values_of in series
        if any(values_of(run).any() for run in runs)
    ]
    note = thinned(runs, CURVE_POINTS, "points", maxima=True)
    return Section(
        id="health",
        title="Health",
        text=_text.HEALTH,
        defines=["hsic_top_token", "nonfinite", "zero", "overhead_ms"],
        groups=[
            Group(name="over steps", legend=runs_legend(runs), panels=curves, note=note),
            heatmaps(runs, maps, values, colors, "Largest share of one token in HSIC", maxima=True),
        ],
        extra=health_table(runs),
    )
