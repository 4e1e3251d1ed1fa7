"""The format of a run file: one SQLite database per run, holding the sums of every snapshot.

Only sums are stored, never values derived from them, so that any window of steps can be recomputed.
"""

import json
import math
import sqlite3
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from repflow.monitor.snapshot import RunInfo, Snapshot

APPLICATION_ID = int.from_bytes(b"rflo", "big")
"""What SQLite's header says of the application: it tells a run file from any other database."""
VERSION = 4
"""Newest version of the format, SQLite's `user_version`; a file has the oldest that can hold it: see `version_of`, and
`Record.version`."""

_HEADER_BYTES = 100
_MAGIC = b"SQLite format 3\x00"
_KEYS = struct.Struct("<qqdd")

# AUTOINCREMENT keeps the number of snapshots ever stored in a page of its own: a reader of a damaged file counts from
# it what is lost. The table of attempts comes first, so that it survives truncation. SQLite stores NaN as NULL, hence
# the nullable `overhead_ms`.
TABLES = (
    "CREATE TABLE attempt (attempt INTEGER PRIMARY KEY, started REAL NOT NULL, info TEXT NOT NULL, "
    "crc32 INTEGER NOT NULL)",
    "CREATE TABLE snapshot (id INTEGER PRIMARY KEY AUTOINCREMENT, attempt INTEGER NOT NULL, step INTEGER NOT NULL, "
    "written REAL NOT NULL, overhead_ms REAL, scalars TEXT NOT NULL, sums BLOB NOT NULL, "
    "crc32 INTEGER NOT NULL, alerts TEXT, UNIQUE (attempt, step))",
)
COLUMNS = "attempt, step, written, overhead_ms, scalars, sums, alerts, crc32"
ADD_ALERTS = "ALTER TABLE snapshot ADD COLUMN alerts TEXT"
"""Brings a file that was begun before there were alerts up to date."""


class RunFileError(ValueError):
    """A run file cannot be read or written; the message says which, what is wrong with it and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the table `snapshot`, in the bytes that are stored."""

    attempt: int
    step: int
    written: float
    """Unix time, in seconds."""
    overhead_ms: float
    scalars: bytes
    """JSON object, name -> number."""
    sums: bytes
    """The flat vector of `SumLayout`, little-endian float64."""
    alerts: bytes = b""
    """JSON list of the alerts that the step raised; empty, and NULL in the file, where there is none."""

    @classmethod
    def of(cls, snapshot: Snapshot, *, attempt: int, written: float) -> "Record":
        """Copy out of `snapshot` what is stored: nothing of the snapshot is referred to afterwards."""
        return cls(
            attempt=attempt,
            step=int(snapshot.step),
            written=written,
            overhead_ms=float(snapshot.overhead_ms) if snapshot.overhead_ms == snapshot.overhead_ms else math.nan,
            scalars=json.dumps({name: float(value) for name, value in snapshot.scalars.items()}).encode(),
            sums=snapshot.sums.detach().numpy().astype("<f8", copy=False).tobytes(),
            alerts=_alerts_as_json(snapshot),
        )

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> "Record | None":
        """The record of a row of `COLUMNS`; None where it is damaged."""
        attempt, step, written, overhead_ms, scalars, sums, alerts, checksum = row
        whole = (
            isinstance(attempt, int)
            and isinstance(step, int)
            and (overhead_ms is None or isinstance(overhead_ms, float))
            and isinstance(written, float)
            and isinstance(scalars, bytes)
            and isinstance(sums, bytes)
            and (alerts is None or isinstance(alerts, bytes))
        )
        if not whole:
            return None
        overhead_ms = math.nan if overhead_ms is None else overhead_ms
        record = cls(attempt, step, written, overhead_ms, scalars, sums, alerts or b"")
        return record if record.checksum == checksum else None

    @property
    def version(self) -> int:
        """The version of the format that it needs: 3 has alerts."""
        return 3 if self.alerts else 1

    @property
    def checksum(self) -> int:
        """CRC-32 of all the other columns; without alerts, that of versions which have none."""
        keys = _KEYS.pack(self.attempt, self.step, self.written, self.overhead_ms)
        return crc32(self.alerts, crc32(self.sums, crc32(self.scalars, crc32(keys))))

    def row(self) -> tuple[Any, ...]:
        """The values of `COLUMNS`."""
        return (
            self.attempt,
            self.step,
            self.written,
            self.overhead_ms,
            self.scalars.decode(),
            self.sums,
            self.alerts.decode() or None,
            self.checksum,
        )

    def tensor(self) -> Float64[Tensor, " size"]:
        """The sums."""
        return torch.from_numpy(np.frombuffer(self.sums, dtype="<f8").astype(np.float64))


def version_of(run: RunInfo) -> int:
    """The version that `run` needs: 2 has counts of decay rates among its sums, 4 has HSIC with earlier states."""
    return 4 if run.probe else 2 if run.ssm_blocks else 1


def _alerts_as_json(snapshot: Snapshot) -> bytes:
    if not snapshot.alerts:
        return b""
    return json.dumps([alert.to_dict() for alert in snapshot.alerts], ensure_ascii=False).encode()


def has_alerts(db: sqlite3.Connection) -> bool:
    """Whether the file has a column for alerts: it was begun, or continued, by a version that knows them."""
    return any(row[1] in ("alerts", b"alerts") for row in db.execute("PRAGMA table_info(snapshot)"))


def identify(path: Path) -> None:
    """Check by its header that `path` is a run file which this version reads.

    Raises:
        FileNotFoundError: There is no such file.
        RunFileError: It is something else, or of a newer format.
    """
    if path.is_dir():
        inside = ", ".join(sorted(entry.name for entry in path.glob("*.db"))[:8])
        raise _refusal(path, "a directory", f"pass one of the run files in it: {inside or 'there is none'}")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a run file, found nothing there; run files are written by `RunFileSink`, by default to "
            "`repflow-runs/<name of the run>.db`: check the path, or the directory that the run was started in"
        )
    if not path.is_file():
        raise _refusal(path, "a pipe or a device", "check the path")
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header:
        raise _refusal(path, "an empty file", "no run has been written to it: start the run, or check the path")
    if not header.startswith(_MAGIC[: len(header)]):
        raise _refusal(path, "a file that is no SQLite database", "check the path")
    if len(header) < _HEADER_BYTES:
        raise _refusal(path, f"the first {len(header)} bytes of a database", "the file was cut off: fetch it again")
    version, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
    if application != APPLICATION_ID:
        raise _refusal(path, "an SQLite database of another application", "check the path")
    if version > VERSION:
        remedy = f"this version of repflow reads formats up to {VERSION}: upgrade repflow"
        raise _refusal(path, f"a run file of format {version}", remedy)


def _refusal(path: Path, found: str, remedy: str) -> RunFileError:
    return RunFileError(f"{path}: expected a run file of repflow, found {found}; {remedy}")
