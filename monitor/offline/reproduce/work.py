"""The folder of work: what was measured so far, under names that tell models and choices apart."""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import repflow
from repflow.monitor.offline import OfflineError
from repflow.monitor.warning import warn

WORK = "work"
"""Below the folder of results. It can be removed: then all is measured again."""


def place(folder: Path, kind: str, name: str, key: Mapping[str, Any]) -> Path:
    """Where that is kept which `key`, plain values, decides; `name` is for the eye."""
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=4).hexdigest()
    return folder / WORK / kind / f"{slug(name)}-{digest}"


def slug(name: str) -> str:
    """A name of a model as it can stand in the name of a file: the last part of a path."""
    last = Path(name).name or Path(name).resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last) or "model"


def content_key(name: str) -> list[Any]:
    """What tells a folder with a model from the same folder with another one; nothing for a name of the hub."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def versions() -> dict[str, str]:
    """Of what numbers may depend on."""
    return {
        "repflow": repflow.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def device_name(kind: str) -> str:
    """The name of the device that numbers come from."""
    return torch.cuda.get_device_name() if kind == "cuda" and torch.cuda.is_available() else kind


def write_json(path: Path, values: Any) -> None:
    """Put a file in place as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any | None:
    """What `write_json` wrote; None if it is not there.

    Raises:
        OfflineError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OfflineError(f"{path} is damaged ({type(error).__name__})") from error


def known_json(path: Path) -> Any | None:
    """What `write_json` wrote of what can be made again: None if it is not there, or damaged, which is said."""
    try:
        return read_json(path)
    except OfflineError as error:
        warn(f"{error}; it is made again")
        return None


def plain(values: torch.Tensor) -> list[Any]:
    """Numbers as JSON can hold them: None for a NaN or an infinity."""
    if not values.dtype.is_floating_point:
        return values.tolist()
    nested = [row.tolist() for row in values.double()] if values.dim() == 1 else [plain(row) for row in values]
    return [None if isinstance(value, float) and not abs(value) < float("inf") else value for value in nested]


class LineStore:
    """Records as lines of JSON, each added when it is whole, so that a process may end at any moment.

    Args:
        path: of the file, which may be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """The records that are there. A line that was cut short, or is damaged, is left out, and that is said."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise OfflineError(f"{self.path}: expected lines of JSON, found what cannot be read: {error}") from error
        whole = []
        for number, line in enumerate(lines, start=1):
            try:
                whole.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                warn(f"{self.path}, line {number} is damaged; it is measured again")
        if len(whole) < len(lines):
            self._replace(whole)
        return whole

    def add(self, record: Mapping[str, Any]) -> None:
        """One more record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Forget all."""
        self.path.unlink(missing_ok=True)

    def _replace(self, records: list[dict[str, Any]]) -> None:
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text("".join(map(_line, records)), encoding="utf-8")
        os.replace(partial, self.path)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
