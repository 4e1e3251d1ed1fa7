"""What an extraction has done so far: one file for each batch, so that it can end at any moment and go on."""

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repflow.monitor.offline import OfflineError
from repflow.monitor.warning import warn

_MANIFEST = "extraction.json"
SAMPLES = "samples.pt"
"""What is known of the samples, but for their tokens."""
UNREADABLE = (RuntimeError, OSError, EOFError, TypeError, ValueError, LookupError, AttributeError, pickle.PickleError)
"""What reading a damaged file raises."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is kept of one batch."""

    samples: Tensor
    """`[R]`: numbers of the samples."""
    sums: Tensor
    """As `SumLayout` has them."""
    features: Tensor | None
    """`[S, R, D]`: the states of each sample's last token."""
    tokens: int
    """Without padding."""
    forward_tokens: int
    """Most tokens, padding included, that a forward may have had: less than a batch after running out of memory."""


def prepare_folder(folder: Path, key: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Make a folder for an extraction, or see that it is the folder of this one.

    Where the file is damaged that tells what the parts are of, they are removed, and that is said.

    Args:
        folder: may be there.
        key: says what is extracted, in plain values.
        about: further plain values, which are kept with it but need not agree.

    Raises:
        OfflineError: the folder holds something else.
    """
    _remove_unknown(folder)
    if not (folder / _MANIFEST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        if any(file.suffix != ".partial" for file in folder.iterdir()):
            raise OfflineError(f"{folder}: expected an empty folder, or one with an {_MANIFEST}; name another")
        partial = (folder / _MANIFEST).with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"key": key, "about": about}, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / _MANIFEST)
    check_folder(folder, key)


def _remove_unknown(folder: Path) -> None:
    """Remove the parts of an extraction whose manifest is damaged."""
    if not (folder / _MANIFEST).exists():
        return
    try:
        _manifest_in(folder)
    except _DAMAGED as error:
        warn(
            f"{folder / _MANIFEST} is damaged ({type(error).__name__}), and what was measured there is not known any "
            "more: the extraction starts anew"
        )
        for path in (*folder.glob(f"{'[0-9]' * 6}.pt"), folder / SAMPLES, folder / _MANIFEST):  # the last one last
            path.unlink(missing_ok=True)


def check_folder(folder: Path, key: Mapping[str, Any]) -> None:
    """See that a folder is that of the extraction which `key` says.

    Raises:
        OfflineError: it holds another one, or none.
    """
    found, wanted = read_manifest(folder)["key"], json.loads(json.dumps(key))
    if differing := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
        told = "; ".join(f"{name} is {found.get(name)!r}, not {wanted.get(name)!r}" for name in differing)
        raise OfflineError(
            f"{folder}: expected what this extraction left there, found that of another: {told}. Name another folder, "
            "or remove this one"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """`key` and `about` of the extraction in a folder; see `prepare_folder`.

    Raises:
        OfflineError: there is none.
    """
    try:
        return _manifest_in(folder)
    except OSError as error:
        raise OfflineError(
            f"{folder}: expected the folder of an extraction, found no {_MANIFEST} ({error.strerror})"
        ) from error
    except _DAMAGED as error:
        raise OfflineError(
            f"{folder}: expected the folder of an extraction, found a damaged {_MANIFEST} ({type(error).__name__}). "
            "Start the extraction again, or remove the folder: it is measured anew"
        ) from error


_DAMAGED = (ValueError, KeyError, TypeError)


def _manifest_in(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    key, about = dict(manifest["key"]), dict(manifest["about"])
    if missing := {"parts", "stream", "num_states"} - key.keys():
        raise KeyError(*missing)
    return {"key": key, "about": about}


class PartStore:
    """The parts of an extraction in its folder.

    A part is written under another name and renamed when it is whole, so that each that is there is: whatever ended the
    process, and however many of them write.

    Args:
        folder: made by `prepare_folder`.
        total: number of parts.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.total = folder, total

    def done(self) -> dict[int, Part]:
        """The parts that are there, by number. What cannot be read is removed, and said."""
        parts = {}
        for number in range(self.total):
            if (part := self._read(number)) is not None:
                parts[number] = part
        return parts

    def whole(self) -> tuple[Part, ...]:
        """All parts in order.

        Raises:
            OfflineError: one is missing.
        """
        done = self.done()
        if missing := [number for number in range(self.total) if number not in done]:
            raise OfflineError(
                f"{self.folder}: expected {self.total} parts, found {len(done)}; part {missing[0]} is the first that "
                "is missing. Start the extraction again, which goes on from there"
            )
        return tuple(done.values())

    def write(self, number: int, part: Part) -> None:
        """Keep a part."""
        path = self._path(number)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save({entry.name: getattr(part, entry.name) for entry in fields(part)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def _read(self, number: int) -> Part | None:
        path = self._path(number)
        if not path.exists():
            return None
        try:
            # Mapped, not read: of the features only the layers that are asked for are ever in memory.
            return Part(**torch.load(path, mmap=True, weights_only=True))
        except UNREADABLE as error:
            warn(f"{path} is damaged ({type(error).__name__}); the batch is measured again")
            path.unlink(missing_ok=True)  # other processes find it too
            return None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.pt"
