"""Figures 1, 2 and 4, and what tables 1 and 2 print, over depth and over lengths."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from repflow.monitor.offline.reproduce.pictures_random import INK
from repflow.monitor.offline.reproduce.written import Result, Row

# Okabe and Ito's colours, which people with any colour vision tell apart; more models than that differ in markers.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")


def draw_token_maps(result: Result) -> Figure:
    """Figure 1: adjacent cosine by token and block, of one prompt, and by relative position, of all of them."""
    keys = [name.removesuffix("/tokens") for name in result.arrays if name.endswith("/tokens")]
    figure = Figure(figsize=(9.5, 0.6 + 2.6 * len(keys)), layout="constrained")
    axes = figure.subplots(len(keys), 2, squeeze=False)
    finite = np.concatenate([array[np.isfinite(array)] for array in result.arrays.values()])
    low = min(0.0, float(finite.min())) if finite.size else 0.0
    image: Any = None
    for row, key in zip(axes, keys, strict=True):
        tokens, positions = result.arrays[f"{key}/tokens"], result.arrays[f"{key}/positions"]
        for axis, part, extent, label in (
            (row[0], tokens, tokens.shape[1], "token of the first prompt"),
            (row[1], positions, 1.0, "relative position, all prompts"),
        ):
            box = (-0.5, len(part) - 0.5, extent, 0)
            image = axis.imshow(part.T, aspect="auto", vmin=low, vmax=1, extent=box, interpolation="nearest")
            axis.set(xlabel="block", ylabel=label, title=_titled(key))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(False)
    figure.colorbar(image, ax=axes, label="cos(h⁽ˡ⁾, h⁽ˡ⁺¹⁾)", shrink=0.8)
    return figure


def draw_curves(result: Result) -> Figure:
    """Figure 2: inter-token similarity over normalised depth, a panel for each length."""
    lengths = sorted(_names(result.rows, "length"))
    figure = Figure(figsize=(4 + 3.5 * len(lengths), 4.4), layout="constrained")
    axes = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    models, tasks = _names(result.rows, "model"), _names(result.rows, "task")
    for axis, length in zip(axes, lengths, strict=True):
        part = [row for row in result.rows if row["length"] == length]
        for key in dict.fromkeys((row["model"], row["task"]) for row in part):
            rows = [row for row in part if (row["model"], row["task"]) == key]
            values = [np.nan if row["value"] is None else row["value"] for row in rows]
            style = _style(models, tasks, rows[0])
            axis.plot(np.linspace(0, 1, len(rows)), values, markevery=_tenth(rows), **style)
        axis.set(xlabel="normalised depth", title=f"{length:,} tokens")
    axes[0].set_ylabel("inter-token similarity")
    figure.legend(handles=_legend(models, tasks), loc="outside lower center", ncols=3)
    return figure


def draw_matrices(result: Result) -> Figure:
    """Figure 4: CKA of every pair of states, one matrix for each model, length and task, and the mean of tasks."""
    rows = _matrix_rows(result.arrays)
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.4 + 3 * columns, 0.5 + 3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    finite = np.concatenate([array[np.isfinite(array)] for array in result.arrays.values()])
    low = min(0.0, float(finite.min())) if finite.size else 0.0
    image: Any = None
    for row, keys in zip(axes, rows, strict=True):
        for axis, key in zip(row, keys, strict=False):
            image = axis.imshow(result.arrays[key], origin="lower", vmin=low, vmax=1, interpolation="nearest")
            axis.set(xlabel="state", ylabel="state", title=_titled(key, "\n"))
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(MaxNLocator(integer=True))
            axis.grid(False)
        for axis in row[len(keys) :]:
            axis.set_visible(False)
    figure.colorbar(image, ax=axes, label=f"CKA, {result.about['choices']['cka_estimator']}", shrink=0.8)
    return figure


def draw_accuracy(result: Result) -> Figure:
    """Table 1 over depth: accuracy of probes, the spread over seeds as a band, and the paper's last layer."""
    lengths = list(dict.fromkeys(row["length"] for row in result.rows))
    figure = Figure(figsize=(1 + 3 * len(lengths), 3.8), layout="constrained")
    axes = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    models, tasks = _names(result.rows, "model"), [task for task in _names(result.rows, "task") if task != "mean"]
    for axis, length in zip(axes, lengths, strict=True):
        for row in result.rows:
            if row["length"] != length or row["task"] == "mean":
                continue
            accuracy = 100 * result.arrays[f"{row['model']}/{row['task']}/{length}"]
            x, style = np.linspace(0, 1, len(accuracy)), _style(models, tasks, row)
            mean = accuracy.mean(1)
            spread = accuracy.std(1, ddof=1) if accuracy.shape[1] > 1 else np.zeros(len(x))
            axis.plot(x, mean, markevery=_tenth(x), **style)
            axis.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)
            axis.axhline(row["chance"], color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
        for told in result.about["comparison"]:
            if told["text"] == "last" and told["length"] == length:
                axis.plot(1, told["paper"], **_paper_style(models, told["model"]))
        axis.set(xlabel="normalised depth", title=f"{length:,} tokens")
    axes[0].set_ylabel("accuracy of the probe, %")
    extra = [Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (1, 3)), label="chance")]
    if result.about["comparison"]:
        extra.append(Line2D([], [], color=INK, marker="o", mfc="none", linestyle="", label="paper, last layer"))
    figure.legend(handles=_legend(models, tasks) + extra, loc="outside lower center", ncols=4)
    return figure


def draw_variation(result: Result) -> Figure:
    """Table 2: V_loc and V_glob over lengths, and the paper's."""
    figure = Figure(figsize=(8.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    models, tasks = _names(result.rows, "model"), [task for task in _names(result.rows, "task") if task != "mean"]
    for axis, name in zip(axes, ("v_loc", "v_glob"), strict=True):
        for model in models:
            for task in tasks:
                rows = [row for row in result.rows if (row["model"], row["task"]) == (model, task)]
                values = [np.nan if row[name] is None else row[name] for row in rows]
                if rows:  # a task may not fit into the window of a model
                    style = _style(models, tasks, rows[0])
                    style["marker"] = style["marker"] or "."
                    axis.plot([row["length"] for row in rows], values, **style)
            paper = [told for told in result.about["comparison"] if (told["model"], told["text"]) == (model, name)]
            lengths = [told["length"] for told in paper]
            axis.plot(lengths, [told["paper"] for told in paper], **_paper_style(models, model))
        axis.set(xlabel="tokens", ylabel={"v_loc": "$V_{loc}$", "v_glob": "$V_{glob}$"}[name])
        axis.set_xscale("log", base=2)
        lengths = _names(result.rows, "length")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set_ylim(bottom=0)
    extra = []
    if result.about["comparison"]:
        extra.append(Line2D([], [], color=INK, marker="o", mfc="none", linestyle="", label="paper, mean over tasks"))
    figure.legend(handles=_legend(models, tasks) + extra, loc="outside lower center", ncols=3)
    return figure


def _matrix_rows(names: Iterable[str]) -> list[list[str]]:
    """A row for each model and length, with its tasks and their mean; for each model where all have but one of them."""
    places = {name: name.rsplit("/", 2) for name in names}
    several = max(Counter((model, length) for model, _, length in places.values()).values()) > 1
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, (model, _, length) in places.items():
        rows[model, length if several else ""].append(name)
    return list(rows.values())


def _look(models: list[str], model: str) -> dict[str, Any]:
    """What tells a model from others: its colour, and a marker on the curves of more models than there are colours."""
    again, place = divmod(models.index(model), len(_COLORS))
    return {"color": _COLORS[place], "marker": _MARKERS[again % len(_MARKERS)]}


def _style(models: list[str], tasks: list[str], row: Row) -> dict[str, Any]:
    """The look of the model, dashes for the task."""
    dashes = _DASHES[tasks.index(row["task"]) % len(_DASHES)]
    return _look(models, row["model"]) | {"linestyle": dashes}


def _tenth(points: Sized) -> int:
    """Which points of a curve have a marker, so that they do not hide it."""
    return -(-len(points) // 10)


def _paper_style(models: list[str], model: str) -> dict[str, Any]:
    """Of the paper's numbers: hollow points."""
    look = _look(models, model)
    return look | {"marker": look["marker"] or "o", "mfc": "none", "linestyle": ""}


def _legend(models: list[str], tasks: list[str]) -> list[Line2D]:
    colors = [Line2D([], [], label=model, **_look(models, model)) for model in models]
    dashes = [
        Line2D([], [], color=INK, linestyle=_DASHES[place % len(_DASHES)], label=task)
        for place, task in enumerate(tasks)
    ]
    return colors + (dashes if len(tasks) > 1 else [])


def _names(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _titled(key: str, between: str = ", ") -> str:
    model, task, length = key.rsplit("/", 2)
    return f"{model}{between}{task}, {int(length):,} tokens"
