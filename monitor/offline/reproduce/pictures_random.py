"""Figures 3, 5, 6 and 7: a column for every model, a row for every policy, the spread over seeds as a band."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from repflow.monitor.offline.reproduce.written import Result, Row

INK = "#1c2126"
# Okabe and Ito's colours, which people with any colour vision tell apart.
SCHEME_COLORS = {"default": "#999999", "gaussian": "#0072b2", "xavier": "#d55e00", "kaiming": "#009e73"}
_SCHEME_DASHES: dict[str, Any] = {"default": ":", "gaussian": "-", "xavier": "--", "kaiming": "-."}
_VARIANT_COLORS = ("#0072b2", "#d55e00", "#009e73")
_VARIANTS = {"figure6": "norms", "figure7": "embedding_scale"}
_NAMES = {"baseline": "norms as they are", "disabled": "norms off", "affine_reset": "norm affines 1 and 0"}


@dataclass(frozen=True, eq=False)
class _Curve:
    scheme: str
    variant: Any
    x: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    """Standard deviation over seeds; 0 for a single one."""


def draw_random(result: Result) -> Figure:
    """The picture of a figure of models drawn at random."""
    models = list(dict.fromkeys(row["model"] for row in result.rows))
    policies = list(dict.fromkeys(row["policy"] for row in result.rows if row["policy"]))
    figure = Figure(figsize=(1.2 + 2.6 * len(models), 1.1 + 2.1 * len(policies)), layout="constrained")
    axes = figure.subplots(len(policies), len(models), squeeze=False, sharex="col", sharey=True)
    variant = _VARIANTS.get(result.target)
    for row, policy in enumerate(policies):
        for column, model in enumerate(models):
            rows = [one for one in result.rows if one["model"] == model and one["policy"] in (policy, None)]
            _panel(axes[row, column], _curves(rows, variant), variant)
            if not row:
                axes[row, column].set_title(f"{model} ({rows[0]['family']})")
        axes[row, 0].set_ylabel(f"1-D policy: {policy}")
    updates = result.about["quantity"] == "update_inter_token"
    for axis in axes[-1]:
        axis.set_xlabel("block" if updates else "state")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supylabel(f"inter-token similarity{' of updates Δh' if updates else ''}", fontsize=9)
    figure.legend(handles=_legend(result, variant), loc="outside lower center", ncols=4)
    return figure


def _curves(rows: Sequence[Row], variant: str | None) -> list[_Curve]:
    seeds: dict[tuple[str, Any], dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = np.nan if row["value"] is None else row["value"]
        seeds[row["scheme"], row[variant] if variant else None][row["seed"]].append(value)
    curves = []
    for (scheme, name), values in seeds.items():
        stacked = np.array(list(values.values()))
        spread = stacked.std(0, ddof=1) if len(stacked) > 1 else np.zeros(stacked.shape[1])
        curves.append(_Curve(scheme, name, np.arange(stacked.shape[1]), stacked.mean(0), spread))
    return curves


def _panel(axis: Axes, curves: Sequence[_Curve], variant: str | None) -> None:
    variants = list(dict.fromkeys(curve.variant for curve in curves))
    for curve in curves:
        style = _style(curve.scheme, variants.index(curve.variant) if variant else None)
        axis.plot(curve.x, curve.mean, **style)
        axis.fill_between(
            curve.x, curve.mean - curve.spread, curve.mean + curve.spread, color=style["color"], alpha=0.2, linewidth=0
        )
    if any(np.isnan(curve.mean).any() for curve in curves):
        axis.text(0.98, 0.02, "gaps: not finite", transform=axis.transAxes, ha="right", va="bottom", fontsize=7)


def _style(scheme: str, variant: int | None) -> dict[str, Any]:
    if scheme == "pretrained":
        return {"color": INK, "linestyle": "-", "linewidth": 2.0}
    if variant is None:
        return {"color": SCHEME_COLORS[scheme], "linestyle": _SCHEME_DASHES[scheme]}
    # Thinner from one to the next: curves that lie on each other all show.
    return {"color": _VARIANT_COLORS[variant], "linestyle": _SCHEME_DASHES[scheme], "linewidth": 2.6 - 0.8 * variant}


def _legend(result: Result, variant: str | None) -> list[Line2D]:
    rows = result.rows
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    if variant is None:
        # The checkpoint runs on other prompts than the models drawn at random.
        prompts = dict.fromkeys(key.rsplit("/", 2)[1] for key in result.about["checkpoints"])
        names = {"pretrained": f"pretrained, on {' and '.join(prompts).replace('_', ' ')}"}
        return [Line2D([], [], label=names.get(scheme, scheme), **_style(scheme, None)) for scheme in schemes]
    dashes = [Line2D([], [], color=INK, linestyle=_SCHEME_DASHES[scheme], label=scheme) for scheme in schemes]
    variants = list(dict.fromkeys(row[variant] for row in rows))
    return dashes + [
        Line2D([], [], color=_VARIANT_COLORS[number], label=_NAMES.get(name) or f"embedding × {name}")
        for number, name in enumerate(variants)
    ]
