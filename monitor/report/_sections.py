"""The page's sections: each a quantity with its definition, and all runs on the same scales."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from repflow.monitor.report import _text
from repflow.monitor.report._axes import finite_range, shown_steps, upper_range, value_axis
from repflow.monitor.report._compare import compare_section
from repflow.monitor.report._drift import drift_section
from repflow.monitor.report._figures import depth_heatmap
from repflow.monitor.report._frame_figures import cka_matrix, token_map
from repflow.monitor.report._frames import frame_indices
from repflow.monitor.report._groups import Group, Panel, Section, compared_over_depth, heatmaps, thinned
from repflow.monitor.report._html import color_legend, kinds_legend
from repflow.monitor.report._runs import Run
from repflow.monitor.report._series import health_section, norms_section, scalars_section, variation_section
from repflow.monitor.report._ssm import ssm_section
from repflow.monitor.report._thin import FRAMES


def build_sections(runs: Sequence[Run], baselines: Sequence[Run]) -> list[Section]:
    """All sections for runs that have at least one snapshot each."""
    steps = shown_steps(runs)
    sections = [
        _inter_token(runs, baselines, steps),
        _updates(runs, baselines),
        _adjacent(runs, baselines, steps),
        _cka(runs),
        drift_section(runs, steps),
        variation_section(runs, steps),
        norms_section(runs, baselines),
        ssm_section(runs),
        scalars_section(runs, steps),
        compare_section(runs),
        health_section(runs, steps),
    ]
    return [section for section in sections if section is not None]


def _inter_token(runs: Sequence[Run], baselines: Sequence[Run], steps: tuple[float, float]) -> Section:
    name, label = "inter_token", "inter-token similarity"
    values = [run.values(name) for run in runs]
    colors = finite_range(values, (0.0, 1.0))
    axis = value_axis(label, [*values, *(run.values(name)[0] for run in baselines)], bounds=(0.0, 1.0))
    maps = [
        depth_heatmap(run, part, over="state", label=label, color_range=colors, step_range=steps)
        for run, part in zip(runs, values, strict=True)
    ]
    start = _text.START if any(run.untrained for run in runs) else _text.NO_START
    note = f"{start} {_text.BASELINE}" if baselines else start
    return Section(
        id="inter-token",
        title="Inter-token similarity",
        text=_text.INTER_TOKEN,
        defines=[name],
        groups=[
            heatmaps(runs, maps, values, colors, label),
            compared_over_depth(runs, baselines, name, over="state", label=label, axis=axis, note=note),
        ],
    )


def _updates(runs: Sequence[Run], baselines: Sequence[Run]) -> Section:
    name, label = "update_inter_token", "similarity of updates"
    values = [run.values(name) for run in runs]
    axis = value_axis(label, [*values, *(run.values(name)[0] for run in baselines)], bounds=(0.0, 1.0))
    return Section(
        id="updates",
        title="Inter-token similarity of updates Δh",
        short="Updates Δh",
        text=_text.UPDATES,
        defines=[name],
        groups=[compared_over_depth(runs, baselines, name, over="block", label=label, axis=axis)],
    )


def _adjacent(runs: Sequence[Run], baselines: Sequence[Run], steps: tuple[float, float]) -> Section:
    name, label = "adjacent", "cosine"
    values = [run.values(name) for run in runs]
    colors = upper_range(values)
    maps = [
        depth_heatmap(run, part, over="block", label=label, color_range=colors, step_range=steps)
        for run, part in zip(runs, values, strict=True)
    ]
    axis = value_axis(label, [*values, *(run.values(name)[0] for run in baselines)], bounds=(1.0, 1.0))
    return Section(
        id="adjacent",
        title="Adjacent-layer similarity",
        text=_text.ADJACENT,
        defines=[name, "adjacent_tokens"],
        groups=[
            heatmaps(runs, maps, values, colors, label, clipped=True),
            _tokens(runs),
            compared_over_depth(runs, baselines, name, over="block", label=label, axis=axis),
        ],
    )


def _tokens(runs: Sequence[Run]) -> Group:
    """The token × layer maps."""
    colors = upper_range([run.data["adjacent_tokens"].values[frame_indices(run)] for run in runs])
    legend = color_legend(colors, "Cosine", clipped=True) + kinds_legend(runs)
    panels = [Panel(title=run.label, figure=token_map(run, colors), run=run, follows=True) for run in runs]
    note = thinned(runs, FRAMES, "maps")
    return Group(name="position by depth at the chosen step", legend=legend, panels=panels, note=note)


def _cka(runs: Sequence[Run]) -> Section:
    colors = finite_range([run.data["cka"].values[frame_indices(run)].ravel() for run in runs], (0.0, 1.0))
    panels = [
        Panel(
            title=run.label,
            detail=f"{run.data.attrs['cka_estimator']} estimator{'' if _has_cka(run) else ', not measured'}",
            figure=cka_matrix(run, colors),
            run=run,
            follows=True,
        )
        for run in runs
    ]
    estimators = sorted({str(run.data.attrs["cka_estimator"]) for run in runs})
    return Section(
        id="cka",
        title=f"CKA of every pair of states ({' and '.join(estimators)} estimator)",
        short="CKA",
        text=_text.CKA,
        defines=["cka"],
        groups=[
            Group(
                name="chosen step",
                legend=color_legend(colors, "CKA") + kinds_legend(runs),
                panels=panels,
                note=thinned(runs, FRAMES, "matrices"),
            )
        ],
    )


def _has_cka(run: Run) -> bool:
    return bool(np.isfinite(run.data["cka"].values[frame_indices(run)]).any())


def slider_steps(runs: Sequence[Run]) -> list[int]:
    """All steps of which a run has a frame, ascending."""
    return sorted(set(chain.from_iterable(run.steps[frame_indices(run)].tolist() for run in runs)))
