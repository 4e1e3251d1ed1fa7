"""What a target leaves in its folder: data, and a JSON file that states every choice. Pictures are drawn from these."""

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.reproduce.targets import TARGETS
from repflow.monitor.offline.reproduce.work import read_json, write_json

Row = Mapping[str, Any]


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
        OfflineError: the JSON file is there, and its data are not, or are damaged.
    """
    about = read_json(_json(folder, target))
    if about is None:
        return None
    try:
        with (folder / f"{target}.csv").open(encoding="utf-8", newline="") as file:
            rows = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
        arrays: dict[str, np.ndarray] = {}
        if (packed := folder / f"{target}.npz").exists():
            with np.load(packed, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
    except (OSError, ValueError, csv.Error, EOFError, zipfile.BadZipFile) as error:
        raise OfflineError(
            f"{folder}: expected {target}.csv{' and .npz' if target in ('figure1', 'figure4') else ''} beside "
            f"{target}.json, whole; {error}. Make the target again with --force"
        ) from error
    return Result(target=target, rows=rows, arrays=arrays, about=about)


def finished(folder: Path, target: str, request: Mapping[str, Any], enough: Callable[[int], bool]) -> bool:
    """Whether a target is there, as it is asked for, of enough samples."""
    about = read_json(_json(folder, target)) if _json(folder, target).exists() else None
    if about is None or not (folder / f"{target}.csv").exists():
        return False
    made = dict(about.get("request", {}))
    samples = made.pop("samples", [])
    return made == json.loads(json.dumps(request)) and all(map(enough, samples))


def results_in(folder: Path) -> list[Result]:
    """All that is in a folder, in the paper's order.

    Raises:
        OfflineError: nothing is, or something damaged.
    """
    if not folder.is_dir():
        raise OfflineError(f"{folder}: expected a folder that `repflow reproduce` has written, found none")
    found = [result for name in TARGETS if (result := read_result(folder, name)) is not None]
    if not found:
        raise OfflineError(
            f"{folder}: expected figures or tables in it, found none of {', '.join(f'{name}.json' for name in TARGETS)}"
        )
    return found


def _json(folder: Path, target: str) -> Path:
    return folder / f"{target}.json"


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
