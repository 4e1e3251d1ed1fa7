"""The section of drift: how far each state has moved on the tokens of a probe batch."""

from collections.abc import Sequence

from repflow.monitor.report import _text
from repflow.monitor.report._axes import Figure, finite_range, upper_range, value_axis
from repflow.monitor.report._figures import depth_heatmap
from repflow.monitor.report._groups import Group, Section, compared_over_depth, heatmaps
from repflow.monitor.report._runs import Run

_TOP = (1.0, 1.0)  # nothing has moved: in every range, however little has


def drift_section(runs: Sequence[Run], steps: tuple[float, float]) -> Section | None:
    """CKA of each state with itself at earlier measurements, of the runs that measure a probe batch."""
    shown = [run for run in runs if "drift_first" in run.data]
    if not shown:
        return None
    label = "CKA with the first measurement"
    axis = value_axis(label, [run.values("drift_first") for run in shown], bounds=_TOP)
    curves = compared_over_depth(shown, (), "drift_first", over="state", label=label, axis=axis)
    return Section(
        id="drift",
        title="Drift on the probe batch",
        short="Drift",
        text=_text.DRIFT,
        defines=["drift_first", "drift_previous"],
        groups=[
            _heatmaps(shown, "drift_first", label, steps),
            curves,
            _heatmaps(shown, "drift_previous", "CKA with the measurement before", steps, clipped=True),
        ],
    )


def _heatmaps(
    runs: Sequence[Run], name: str, label: str, steps: tuple[float, float], *, clipped: bool = False
) -> Group:
    values = [run.values(name) for run in runs]
    colors = upper_range(values) if clipped else finite_range(values, _TOP)
    figures: list[Figure] = [
        depth_heatmap(run, part, over="state", label=label, color_range=colors, step_range=steps)
        for run, part in zip(runs, values, strict=True)
    ]
    return heatmaps(runs, figures, values, colors, label, clipped=clipped)
