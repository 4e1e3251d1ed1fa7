"""What a target leaves in its folder: data, and a JSON file that states every choice. Pictures are drawn from these."""

import csv
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.reproduce.targets import TARGETS
from repflow.monitor.offline.reproduce.work import known_json, read_json, write_json

Row = Mapping[str, Any]

_WORDS = ("model", "family", "task", "scheme", "policy", "norms")
"""Columns of text; all others are of numbers."""
_MEASURED = ("model", "task", "length")
_DRAWN = ("model", "family", "scheme", "policy", "norms", "embedding_scale", "seed", "value")
_COLUMNS = {
    "figure1": (*_MEASURED, "value"),
    "figure2": (*_MEASURED, "value"),
    "figure3": _DRAWN,
    "figure4": _MEASURED,
    "figure5": _DRAWN,
    "figure6": _DRAWN,
    "figure7": _DRAWN,
    "table1": (*_MEASURED, "chance"),
    "table2": (*_MEASURED, "v_loc", "v_glob"),
}
"""What pictures are drawn from."""
_ARRAYS = {"figure1": ("/tokens", "/positions"), "figure4": ("",), "table1": ("",)}
"""How the names of a target's matrices end, behind model, task and length."""
_TOLD = ("title", "paper", "choices", "skipped", "comparison")
_TOLD_OF_DRAWN = (*_TOLD, "quantity", "checkpoints")
"""What pictures and page tell of the JSON file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """A target as it is written and read."""

    target: str
    rows: Sequence[Row]
    """Of the CSV file: plain values, None where nothing could be measured."""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of the npz file, if the target has any."""
    about: Mapping[str, Any]
    """Of the JSON file."""


def write_result(folder: Path, result: Result) -> None:
    """Write data first and the JSON file last: where this is, the rest is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder, result.target).unlink(missing_ok=True)
    _replace(folder / f"{result.target}.csv", _csv(result.rows).encode())
    if result.arrays:
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **{name: array for name, array in result.arrays.items()})
        _replace(folder / f"{result.target}.npz", content.getvalue())
    write_json(_json(folder, result.target), result.about)


def read_result(folder: Path, target: str) -> Result | None:
    """What was written; None if there is nothing whole.

    Raises:
        OfflineError: the JSON file is there, and it or its data are damaged, of something else, or not there.
    """
    if not _json(folder, target).exists():
        return None
    try:
        about = _told(read_json(_json(folder, target)), target)
        rows = _read_rows(folder / f"{target}.csv", target)
        arrays: dict[str, np.ndarray] = {}
        if target in _ARRAYS:
            with np.load(folder / f"{target}.npz", allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            _check_arrays(rows, arrays, target)
    except (OSError, ValueError, csv.Error, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise OfflineError(
            f"{folder}: expected {target}.csv{' and .npz' if target in _ARRAYS else ''} beside {target}.json, whole; "
            f"{error}. Make the target again with --force"
        ) from error
    return Result(target=target, rows=rows, arrays=arrays, about=about)


def finished(folder: Path, target: str, request: Mapping[str, Any], enough: Callable[[int], bool]) -> bool:
    """Whether a target is there, as it is asked for, of enough samples."""
    about = known_json(_json(folder, target))
    if not isinstance(about, dict) or not (folder / f"{target}.csv").exists():
        return False
    made = dict(about.get("request", {}))
    samples = made.pop("samples", [])
    return made == json.loads(json.dumps(request)) and all(map(enough, samples))


def targets_in(folder: Path) -> list[str]:
    """What is in a folder, whole or not, in the paper's order.

    Raises:
        OfflineError: nothing is.
    """
    if not folder.is_dir():
        raise OfflineError(f"{folder}: expected a folder that `repflow reproduce` has written, found none")
    found = [name for name in TARGETS if _json(folder, name).exists()]
    if not found:
        raise OfflineError(
            f"{folder}: expected figures or tables in it, found none of {', '.join(f'{name}.json' for name in TARGETS)}"
        )
    return found


def _json(folder: Path, target: str) -> Path:
    return folder / f"{target}.json"


def _told(about: Any, target: str) -> Mapping[str, Any]:
    """The JSON file, if it tells what is asked of it."""
    asked = _TOLD_OF_DRAWN if TARGETS[target].random else _TOLD
    if not isinstance(about, dict):
        raise ValueError(f"{target}.json has no object")
    if missing := [name for name in asked if name not in about]:
        raise ValueError(f"{target}.json has no {missing[0]!r}")
    return about


def _read_rows(path: Path, target: str) -> list[Row]:
    """The CSV file, if it has the columns that pictures are drawn from."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns, cells = reader.fieldnames or (), list(reader)
    if missing := [name for name in _COLUMNS[target] if name not in columns]:
        raise ValueError(f"{path.name} has no column {missing[0]!r}")
    if not cells:
        raise ValueError(f"{path.name} has no rows")
    rows: list[Row] = []
    for number, row in enumerate(cells, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path.name} has a row of another width: number {number}")
        rows.append({name: _value(text) for name, text in row.items()})
        if wrong := [name for name in _COLUMNS[target] if name not in _WORDS and isinstance(rows[-1][name], str)]:
            raise ValueError(f"{path.name} has no number in column {wrong[0]!r} of row {number}")
    return rows


def _check_arrays(rows: Sequence[Row], arrays: Mapping[str, np.ndarray], target: str) -> None:
    """See that every measurement among the rows has its matrices."""
    for row in rows:
        for ending in _ARRAYS[target]:
            name = f"{row['model']}/{row['task']}/{row['length']}{ending}"
            if row["task"] != "mean" and (name not in arrays or arrays[name].ndim != 2):
                raise ValueError(f"{target}.npz has no matrix {name!r}")


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    """A cell as it was: a number where it reads as one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
