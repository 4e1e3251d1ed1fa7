"""The difference of two runs, which the page's reader chooses."""

from collections.abc import Sequence
from html import escape

from repflow.monitor.report import _text
from repflow.monitor.report._frame_figures import compared_curves, compared_matrix
from repflow.monitor.report._groups import Group, Panel, Section
from repflow.monitor.report._runs import Run

_OVER_DEPTH = {
    "inter_token": "Inter-token similarity",
    "update_inter_token": "Similarity of updates",
    "adjacent": "Adjacent-layer similarity",
    "norms": "Norm, stream units",
}
_DRIFT = {
    "drift_first": "Drift: CKA with the first measurement",
    "drift_previous": "Drift: CKA with the measurement before",
}
_OVER_STEPS = {"v_loc_rel": "V_loc / RMS", "v_glob_rel": "V_glob / RMS"}


def compare_section(runs: Sequence[Run]) -> Section | None:
    """A − B on curves and matrices, if there are two runs."""
    if len(runs) < 2:
        return None
    drifting = sum("drift_first" in run.data for run in runs) > 1
    depth = [
        Panel(title=title, figure=compared_curves("A − B", what="curves", name=name), follows=True)
        for name, title in (_OVER_DEPTH | (_DRIFT if drifting else {})).items()
    ]
    matrices = [
        Panel(title="CKA", figure=compared_matrix("cka", 330), follows=True),
        Panel(title="Adjacent-layer similarity by position", figure=compared_matrix("tokens", 330), follows=True),
    ]
    shared = [name for name in runs[0].scalars if all(name in run.data for run in runs)][:1]
    steps = [
        Panel(title=title, figure=compared_curves("A − B", what="steps", name=name), follows=True)
        for name, title in (_OVER_STEPS | {name: name for name in shared}).items()
    ]
    alike = len({run.depth for run in runs}) == 1
    return Section(
        id="compare",
        title="Difference of two runs",
        short="A − B",
        text=_text.COMPARE + ("" if alike else _text.COMPARE_DEPTHS) + _choice(runs),
        groups=[
            Group(name="curves over depth", legend="", panels=depth),
            Group(name="matrices", legend="", panels=matrices),
            Group(name="curves over steps", legend="", panels=steps),
        ],
    )


def _choice(runs: Sequence[Run]) -> str:
    """Two lists of the runs, the first and the second chosen."""

    def options(name: str, chosen: int) -> str:
        # With ids, so that a choice outlives a run that comes later and stands before it.
        return "".join(
            f'<option id="compare-{name}-{run.index}" value="{run.index}"{" selected" if place == chosen else ""}>'
            f"{escape(run.label)}</option>"
            for place, run in enumerate(runs)
        )

    lists = (
        f'<label for="compare-{name}">Run {name}</label><select id="compare-{name}">{options(name, place)}</select>'
        for place, name in enumerate("AB")
    )
    return f'<p class="controls">{"<span>−</span>".join(lists)}</p>'
