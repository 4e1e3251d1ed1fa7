"""What the paper prints, beside what was measured."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from repflow.monitor.offline.paper_models import PAPER_MODELS
from repflow.monitor.offline.reproduce.claims import Curve, curves_of
from repflow.monitor.offline.reproduce.written import Row
from repflow.monitor.offline.tasks_command import TASKS

_TASKS = " and ".join(TASKS)


PAPER_LENGTH = 2048
"""Tokens of the prompts in its figures."""


@cache
def paper_values() -> dict[str, Any]:
    """`paper_values.json`: by target, with the place in the paper."""
    return json.loads((files("repflow.monitor.offline.reproduce") / "paper_values.json").read_text(encoding="utf-8"))


def paper_model(name: str) -> str | None:
    """The paper's name of a model, by its name here, on the hub, or of its folder; None if it is none of them."""
    last = Path(name).name.lower()
    return next((key for key, model in PAPER_MODELS.items() if last in (key, Path(model.hub).name.lower())), None)


def reading_of(target: str) -> str | None:
    """How the paper's numbers are read, and beside what they stand; None where it prints none."""
    if (known := paper_values().get(target)) is None:
        return None
    if target.startswith("figure"):
        same = f"with {PAPER_LENGTH:,} tokens"
        of = "random ids" if target == "figure3" else f"checkpoints on {_TASKS}, means over both,"
    else:
        same, of = "of the same length", f"means over {_TASKS}"
    return " ".join(filter(None, [known.get("note"), f"Held against {of} {same} only."]))


def compare_curves(target: str, curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """The findings' values beside ours, for curves over depth by model."""
    known = paper_values()[target]
    return [
        {"model": name, "text": row["text"], "where": known["where"]} | beside(row["value"], _at(curve, row["at"]))
        for name, curve in curves.items()
        for row in known["rows"]
        if row["model"] == paper_model(name)
    ]


def compare_random(target: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same for models drawn at random, by scheme and policy; means over seeds."""
    if target not in paper_values():
        return []
    found = []
    for (name, choice), curve in curves_of(rows).values.items():
        if choice[0] in paper_values()[target]["schemes"]:
            told = {"scheme": choice[0], "policy": choice[1]}
            found += [told | row for row in compare_curves(target, {name: curve})]
    return found


def compare_matrices(target: str, matrices: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The findings' values beside ours, for matrices `[S, S]` by model."""
    known = paper_values()[target]
    found = []
    for name, matrix in matrices.items():
        for row in known["rows"]:
            if row["model"] == paper_model(name) and max(row["at"]) < len(matrix):
                value = float(matrix[tuple(row["at"])])
                told = {"model": name, "text": row["text"], "where": known["where"]}
                found.append(told | beside(row["value"], value if np.isfinite(value) else None))
    return found


def compare_table(target: str, rows: Sequence[Row], columns: Sequence[str]) -> list[dict[str, Any]]:
    """A table's values beside ours, for rows with `model` and `length`."""
    known = paper_values()[target]
    return [
        {"model": row["model"], "length": row["length"], "text": column, "where": known["where"]}
        | beside(printed[column], row[column])
        for row in rows
        for printed in known["rows"]
        if printed["model"] == paper_model(row["model"]) and printed["length"] == row["length"]
        for column in columns
    ]


def beside(paper: float | list[float], ours: float | None) -> dict[str, Any]:
    """Both, and ours minus the paper's; from the nearer end where it names a range, 0 inside of it."""
    low, high = paper if isinstance(paper, list) else (paper, paper)
    difference = None if ours is None else ours - min(max(ours, low), high)
    return {"paper": paper, "ours": ours, "difference": difference}


def _at(curve: Curve, place: int | list[int | None]) -> float | None:
    """The value at an index, or the median of a part; None if there is none, or it is no number."""
    if isinstance(place, list):
        known = [value for value in curve[slice(*place)] if value is not None]
        return median(known) if known else None
    return curve[place] if place < len(curve) else None
