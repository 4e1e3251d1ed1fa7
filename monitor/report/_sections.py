"""The page's sections: each a quantity with its definition, and all runs on the same scales."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from repflow.monitor.report import _text
from repflow.monitor.report._axes import Figure, Floats, finite_range, shown_steps, value_axis
from repflow.monitor.report._figures import cka_heatmap, depth_heatmap, depth_overlay
from repflow.monitor.report._groups import (
    Group,
    Panel,
    Section,
    chosen,
    curves_over_depth,
    heatmaps,
    over_steps,
    thinned,
)
from repflow.monitor.report._html import color_legend, runs_legend
from repflow.monitor.report._overview import health_table
from repflow.monitor.report._runs import Run
from repflow.monitor.report._thin import CKA_STEPS, CURVE_POINTS, spread

MAX_SCALARS = 8
CLIPPED_SHARE = 0.2
"""Share of the adjacent-layer similarities that shares the darkest colour."""


def build_sections(runs: Sequence[Run]) -> list[Section]:
    """All sections for runs that have at least one snapshot each."""
    steps = shown_steps(runs)
    sections = [
        _inter_token(runs, steps),
        _adjacent(runs, steps),
        _cka(runs),
        _variation(runs, steps),
        _norms(runs),
        _scalars(runs, steps),
        _health(runs, steps),
    ]
    return [section for section in sections if section is not None]


def _inter_token(runs: Sequence[Run], steps: tuple[float, float]) -> Section:
    values = [run.values("inter_token") for run in runs]
    colors = finite_range(values, (0.0, 1.0))
    axis = value_axis("inter-token similarity", values, bounds=(0.0, 1.0))
    label = "inter-token similarity"
    maps = [
        depth_heatmap(run, "inter_token", over="state", label=label, color_range=colors, step_range=steps)
        for run in runs
    ]
    return Section(
        id="inter-token",
        title="Inter-token similarity",
        text=_text.INTER_TOKEN,
        groups=[
            heatmaps(runs, maps, values, colors, label),
            curves_over_depth(runs, "inter_token", label, axis),
            _last_step(runs, depth_overlay(runs, "inter_token", over="state", label=label, y_axis=axis)),
        ],
    )


def _adjacent(runs: Sequence[Run], steps: tuple[float, float]) -> Section:
    values = [run.values("adjacent") for run in runs]
    colors = _upper_range(values)
    label = "cosine"
    maps = [
        depth_heatmap(run, "adjacent", over="block", label=label, color_range=colors, step_range=steps) for run in runs
    ]
    overlay = depth_overlay(
        runs,
        "adjacent",
        over="block",
        label=label,
        y_axis=value_axis("cosine", [part[-1] for part in values], bounds=(1.0, 1.0)),
    )
    return Section(
        id="adjacent",
        title="Adjacent-layer similarity",
        text=_text.ADJACENT,
        groups=[
            heatmaps(runs, maps, values, colors, label, clipped=True),
            _last_step(runs, overlay),
        ],
    )


def _last_step(runs: Sequence[Run], figure: Figure) -> Group:
    if len(runs) > 1:
        panel = Panel(title="All runs at their last step", figure=figure)
    else:
        panel = Panel(title="Last step", detail=f"{runs[0].steps[-1]:,}", figure=figure)
    return Group(name="last step over depth", legend=runs_legend(runs), panels=[panel])


def _upper_range(values: Sequence[Floats]) -> tuple[float, float]:
    """The range of the upper `1 - CLIPPED_SHARE` of the values.

    A block that rewrites the stream, often the first one, would otherwise leave one colour for all others.
    """
    _, high = finite_range(values)
    known = np.concatenate([part[np.isfinite(part)] for part in values])
    low = float(np.quantile(known, CLIPPED_SHARE)) if known.size else 0.0
    return min(low, high - 1e-3), high


def _cka(runs: Sequence[Run]) -> Section:
    payloads = [_cka_payload(run) for run in runs]
    colors = finite_range([run.values("cka") for run in runs], (0.0, 1.0))
    panels = []
    for run, payload in zip(runs, payloads, strict=True):
        estimator = str(run.data.attrs["cka_estimator"])
        measured = "" if payload["steps"] else " not measured"
        figure = {**cka_heatmap(run, colors), "cka": payload}
        panels.append(Panel(title=run.label, detail=f"{estimator} estimator,{measured}", figure=figure, run=run))
    positions = sorted({step for payload in payloads for step in payload["steps"]})
    estimators = sorted({str(run.data.attrs["cka_estimator"]) for run in runs})
    return Section(
        id="cka",
        title=f"CKA of every pair of states ({' and '.join(estimators)} estimator)",
        text=_text.CKA,
        groups=[
            Group(
                name="chosen step",
                legend=color_legend(colors, "CKA"),
                panels=panels,
                note=thinned(runs, CKA_STEPS, "matrices"),
                slider=positions,
            )
        ],
    )


def _cka_payload(run: Run) -> dict[str, Any]:
    """At most `CKA_STEPS` lower triangles with three decimals, from snapshots that have CKA."""
    matrices = run.values("cka")
    measured = np.flatnonzero(np.isfinite(matrices).any(axis=(1, 2)))
    kept = measured[spread(len(measured), CKA_STEPS)] if measured.size else measured
    return {"steps": run.steps[kept].tolist(), "triangles": [_triangle(matrices[index]) for index in kept]}


def _triangle(matrix: Floats) -> list[list[float | None]]:
    return [
        [round(value, 3) if np.isfinite(value) else None for value in row[: index + 1].tolist()]
        for index, row in enumerate(matrix)
    ]


def _variation(runs: Sequence[Run], steps: tuple[float, float]) -> Section:
    names = {
        "v_loc": ("V_loc", "stream units"),
        "v_glob": ("V_glob", "stream units"),
        "v_loc_rel": ("V_loc / RMS", "dimensionless"),
        "v_glob_rel": ("V_glob / RMS", "dimensionless"),
    }
    panels = [
        over_steps(runs, lambda run, name=name: run.values(name), title, f"{title}, {unit}", steps)
        for name, (title, unit) in names.items()
    ]
    return Section(
        id="variation",
        title="Layer variation: V_loc and V_glob",
        text=_text.VARIATION,
        groups=[
            Group(
                name="over steps", legend=runs_legend(runs), panels=panels, note=thinned(runs, CURVE_POINTS, "points")
            )
        ],
    )


def _norms(runs: Sequence[Run]) -> Section:
    shown = [run.values("norms")[chosen(run)] for run in runs]
    axis = value_axis("L2 norm", shown)
    return Section(
        id="norms", title="Norms", text=_text.NORMS, groups=[curves_over_depth(runs, "norms", "L2 norm", axis)]
    )


def _scalars(runs: Sequence[Run], steps: tuple[float, float]) -> Section | None:
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


def _health(runs: Sequence[Run], steps: tuple[float, float]) -> Section:
    values = [run.values("hsic_top_token") for run in runs]
    colors = (0.0, 1.0)
    label = "share of one token"
    maps = [
        depth_heatmap(
            run, "hsic_top_token", over="state", label=label, color_range=colors, step_range=steps, reduce="max"
        )
        for run in runs
    ]
    series: list[tuple[str, str, Callable[[Run], Floats]]] = [
        ("Non-finite tokens", "tokens, worst state", lambda run: run.values("nonfinite").max(axis=1)),
        ("Zero tokens", "tokens, worst state", lambda run: run.values("zero").max(axis=1)),
        ("Monitor overhead", "milliseconds", lambda run: run.values("overhead_ms")),
    ]
    # A count that is zero throughout is said in the table; a flat line would add nothing.
    curves = [
        over_steps(runs, values_of, title, unit, steps, bounds=(0.0, 1.0), reduce="max")
        for title, unit, values_of in series
        if any(values_of(run).any() for run in runs)
    ]
    return Section(
        id="health",
        title="Health",
        text=_text.HEALTH,
        groups=[
            Group(
                name="over steps",
                legend=runs_legend(runs),
                panels=curves,
                note=thinned(runs, CURVE_POINTS, "points", maxima=True),
            ),
            heatmaps(runs, maps, values, colors, "Largest share of one token in HSIC", maxima=True),
        ],
        extra=health_table(runs),
    )
