"""The section of state-space blocks: how long they remember."""

from collections.abc import Sequence

import numpy as np

from repflow.monitor.report import _text
from repflow.monitor.report._axes import Figure, Floats, value_axis
from repflow.monitor.report._frame_figures import quantile_bars
from repflow.monitor.report._frames import frame_indices
from repflow.monitor.report._groups import Group, Panel, Section, curves_over_depth, thinned
from repflow.monitor.report._html import kinds_legend
from repflow.monitor.report._runs import Run
from repflow.monitor.report._thin import FRAMES


def ssm_section(runs: Sequence[Run]) -> Section | None:
    """Memory length and decay of the runs that have them."""
    shown = [run for run in runs if "ssm_memory" in run.data]
    if not shown:
        return None
    memory = value_axis("memory length, tokens", [_framed(run, "ssm_memory") for run in shown])
    medians = value_axis("median memory, tokens", [_median(run) for run in shown])
    decay = value_axis("decay", [_framed(run, "ssm_decay") for run in shown], bounds=(1.0, 1.0))
    return Section(
        id="ssm",
        title="State-space blocks: memory and decay",
        short="Memory and decay",
        text=_text.SSM,
        defines=["ssm_memory", "ssm_decay"],
        groups=[
            _quantiles(shown, "ssm_memory", "Memory length", memory, " tokens"),
            _quantiles(shown, "ssm_decay", "Decay", decay, ""),
            curves_over_depth(shown, _median, over="block", label="median memory", axis=medians, unit=" tokens"),
        ],
    )


def _quantiles(runs: Sequence[Run], name: str, title: str, axis: Figure, unit: str) -> Group:
    panels = [
        Panel(
            title=f"{title}, {run.label}",
            figure=quantile_bars(run, name, label=title.lower(), unit=unit, y_axis=axis),
            run=run,
            follows=True,
        )
        for run in runs
    ]
    return Group(
        name=f"{title.lower()} at the chosen step",
        legend=kinds_legend(runs),
        panels=panels,
        note=thinned(runs, FRAMES, "steps"),
    )


def _framed(run: Run, name: str) -> Floats:
    return run.values(name)[frame_indices(run)].ravel()


def _median(run: Run) -> Floats:
    """Median memory length, [n, blocks]."""
    (median,) = np.flatnonzero(run.values("quantile") == 0.5)
    return run.values("ssm_memory")[:, :, median]
