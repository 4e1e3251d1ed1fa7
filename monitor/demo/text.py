"""The text that the demo's models read: bytes of files, cut into a training and a validation part."""

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from repflow.monitor.demo import DemoError

MAX_BYTES = 8 * 2**20
"""Reading stops here: a demo sees far fewer bytes than this."""

VALIDATION_SHARE = 0.05

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "__pycache__"}
"""Folders of the standard library that are not its source (tests, fixtures, installed packages) or are mere tables."""


@dataclass(frozen=True)
class Corpus:
    """Bytes of text, the last part of them held out."""

    train: UInt8[Tensor, " N"]
    validation: UInt8[Tensor, " M"]
    source: str
    """Where the bytes came from, in words."""


class ByteWindows(Dataset[Tensor]):
    """Windows of `length + 1` bytes, `length` apart: bytes 0 … length−1 are read, bytes 1 … length predicted.

    Item i is `Int64[length + 1]`. The tail that fills no window is left out.
    """

    def __init__(self, data: UInt8[Tensor, " N"], length: int) -> None:
        self._data = data
        self._length = length

    def __len__(self) -> int:
        return max(len(self._data) - 1, 0) // self._length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self._length
        return self._data[start : start + self._length + 1].long()


def load_corpus(path: Path | None, *, sequence: int, batch: int) -> Corpus:
    """Read a file, a folder, or (`path=None`) the source of the running Python's standard library.

    A folder is read file by file, in an order that depends on the names alone, leaving out hidden and binary files; at
    most `MAX_BYTES` are read. Of the bytes, `VALIDATION_SHARE` but at least one window of `sequence` is held out.

    Raises:
        DemoError: missing, empty or unreadable, or fewer bytes than one training batch and one validation window.
    """
    data = _read(path)
    source = str(path) if path is not None else "the Python standard library"
    needed = (batch + 1) * sequence + 2
    if len(data) < needed:
        raise DemoError(
            f"--text: one batch of {batch} × {sequence} bytes and a window held out take at least {needed:,} bytes, "
            f"{source} holds {len(data):,}; pass a larger file or a folder of text"
        )
    held_out = min(max(int(len(data) * VALIDATION_SHARE), sequence + 1), len(data) - batch * sequence - 1)
    # A bytearray is writable, which `frombuffer` asks for.
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Corpus(train=tensor[:-held_out], validation=tensor[-held_out:], source=source)


def _read(path: Path | None) -> bytes:
    """The bytes of a file or of all text files of a folder, up to `MAX_BYTES`."""
    if path is None:
        path, files = _standard_library()
    elif not path.exists():
        raise DemoError(f"--text: no such file or folder: {path}")
    else:
        files = [path] if path.is_file() else _text_files(path)
    parts: list[bytes] = []
    room = MAX_BYTES
    for file in files:
        part = _head(file, room)
        # A NUL byte is what tells a binary file from text; a file named by the user is taken as it is.
        if file != path and b"\0" in part[:1024]:
            continue
        parts.append(part)
        room -= len(part)
        if room <= 0:
            break
    data = b"".join(parts)
    if not data:
        raise DemoError(f"--text: {path} holds no text; pass a file, or a folder with text files")
    return data


def _head(file: Path, size: int) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(size)
    except OSError as error:
        raise DemoError(f"--text: cannot read {file}: {error.strerror}") from error


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in root.rglob("*.py") if not _SKIPPED & set(file.relative_to(root).parts)]
    if not files:
        raise DemoError(f"this Python carries no source of its standard library in {root}; pass --text PATH")
    return root, _mixed(files)


def _text_files(folder: Path) -> list[Path]:
    return _mixed(list(_visible_files(folder)))


def _visible_files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.is_file():
            yield file


def _mixed(files: list[Path]) -> list[Path]:
    """In an order that depends on the paths alone, and mixes folders: what is held out is then like the rest."""
    files = sorted(files)
    random.Random(0).shuffle(files)
    return files
