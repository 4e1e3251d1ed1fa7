"""Writes a run to one SQLite file, so that a killed process loses at most the snapshot under way."""

import os
import re
import sqlite3
import time
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

from repflow.monitor.sinks._base import AbstractSink
from repflow.monitor.sinks._journal import journal_mode
from repflow.monitor.sinks._schema import (
    ADD_ALERTS,
    APPLICATION_ID,
    COLUMNS,
    TABLES,
    VERSION,
    Record,
    RunFileError,
    has_alerts,
    identify,
)
from repflow.monitor.sinks._worker import Worker
from repflow.monitor.snapshot import RunInfo, Snapshot

CHECKPOINT_EVERY = 32
"""Snapshots between two times that the write-ahead log is moved into the file itself."""

_LOCK_SECONDS = 10.0
_NAME_BYTES = 200  # file systems allow 255, with what stands before and behind


class RunFileSink(AbstractSink):
    """Stores the sums of every snapshot in a run file, to be read by `open_run`, also while it is being written.

    Each `start` opens a new attempt in the file: a run that is resumed, or started again, continues it.
    A thread writes; what it fails at (a full disk, say) is raised by the next `write` or `close`.

    Args:
        path: The file. By default `<name of the run>.db` in `directory`, chosen at `start`; of a name that cannot be
            that of a file, what can be, and a hash.
        directory: Where files of the default name go; made if missing.
    """

    path: Path | None
    """The run file; None before `start` where no path was given."""

    def __init__(
        self, path: str | os.PathLike[str] | None = None, directory: str | os.PathLike[str] = "repflow-runs"
    ) -> None:
        self.path = self._given = None if path is None else Path(path)
        self._directory = Path(directory)
        self._worker: Worker[Record] | None = None
        self._attempt = 0
        self._size = 0

    def start(self, run: RunInfo) -> None:
        """Open a new attempt.

        Raises:
            RunFileError: The file cannot be written, or is something else than a run file.
        """
        self.close()
        # absolute, since the training loop may change the working directory
        self.path = (self._given or self._directory / f"{_file_name(run.name)}.db").absolute()
        self._size = run.layout.size
        self._attempt = _open_attempt(self.path, run)
        self._worker = Worker(partial(_write_all, self.path), name=f"run file {self.path}")
        # a sink that is dropped without `close` must not leave its thread behind
        weakref.finalize(self, self._worker.stop).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy writes to the same place, but has yet to be started."""
        return {**self.__dict__, "_worker": None}

    def write(self, snapshot: Snapshot) -> None:
        """Queue the snapshot; the same step written again in this attempt replaces it.

        Raises:
            RuntimeError: Not started, or already closed, or called in a forked process.
            ValueError: The sums are not those of the run's number of states.
            RunFileError: The thread failed at an earlier snapshot.
        """
        if self._worker is None:
            raise RuntimeError("`RunFileSink.write`: expected `start` to come first; call `start(run)`")
        if snapshot.sums.numel() != self._size:
            raise ValueError(
                f"`RunFileSink.write`: expected {self._size} sums, as the run given to `start` has, got "
                f"{snapshot.sums.numel()}; a run with another number of states needs a `start` of its own"
            )
        self._worker.submit(Record.of(snapshot, attempt=self._attempt, written=time.time()))

    def flush(self) -> None:
        """Wait until everything written so far is stored, at most 30 s.

        Raises:
            RunFileError: Something could not be stored, and no call has said so yet.
            TimeoutError: The file system hangs.
        """
        if self._worker is not None:
            self._worker.flush()

    def close(self) -> None:
        """Wait until all is stored, at most 30 s.

        Raises:
            RunFileError: Something could not be stored, and no call has said so yet.
            TimeoutError: The file system hangs.
        """
        if self._worker is not None:
            self._worker.close()


def _file_name(name: str) -> str:
    """The name of a run as that of a file; one that had to be changed, such as `org/model`, gets a hash of its own."""
    safe = re.sub(r"[^\w.+=-]+", "-", name).strip(".-").encode()[:_NAME_BYTES].decode(errors="ignore")
    if safe == name:
        return name
    return f"{safe or 'run'}-{sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite and of the file system into one that says what to do."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise RunFileError(
            f"{path}: could not be written ({type(error).__name__}: {error}); {_remedy(error)}. What was stored before "
            "can be read with `open_run`"
        ) from error


def _remedy(error: BaseException) -> str:
    text = str(error)
    if "full" in text or "I/O" in text:
        return "is the disk full, or a quota or size limit reached? Make room, or pass another path=, and start again"
    if "locked" in text:
        return "another process is writing to it: give each run a path= of its own"
    if "malformed" in text:
        return "it is damaged: move it away, or pass another path="
    return "check that its directory exists and may be written to, or pass another path="


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # a full disk has rolled back already
            db.execute("ROLLBACK")
        raise


def _open_attempt(path: Path, run: RunInfo) -> int:
    """Make the file if need be, add an attempt and return its number."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (not path.is_file() or path.stat().st_size > 0):
            identify(path)
        with closing(_connect(path)) as db, _transaction(db):
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'attempt'").fetchone() is None:
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                for table in TABLES:
                    db.execute(table)
            if not has_alerts(db):
                db.execute(ADD_ALERTS)
            db.execute(f"PRAGMA user_version = {VERSION}")
            info = run.to_json()
            row = (time.time(), info, crc32(info.encode()))
            added = db.execute("INSERT INTO attempt (started, info, crc32) VALUES (?, ?, ?)", row)
            return int(added.lastrowid or 0)


def _write_all(path: Path, records: Iterator[Record]) -> None:
    """What the thread runs: it alone holds the connection."""
    with _explained(path), closing(_connect(path)) as db:
        if journal_mode(path.parent) == "WAL":
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # safe against a killed process; the log is synced as it is moved
        for number, record in enumerate(records, start=1):
            with _transaction(db):
                _store(db, record, path)
            del record
            if number % CHECKPOINT_EVERY == 0:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        db.execute("PRAGMA busy_timeout = 1000")  # the training thread is waiting by now
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        # One plain file is left, which can be copied, and read where nothing may be written. While a reader holds on to
        # the log this fails, and the log stays beside the file.
        with suppress(sqlite3.OperationalError):
            db.execute("PRAGMA journal_mode = DELETE")


def _store(db: sqlite3.Connection, record: Record, path: Path) -> None:
    newest = db.execute("SELECT max(attempt) FROM attempt").fetchone()[0]
    if newest != record.attempt:
        raise RunFileError(
            f"{path}: attempt {record.attempt} was being written when another process or sink opened attempt {newest}; "
            "expected one writer at a time: give each run that goes on at the same time a path= or a name of its own"
        )
    row = record.row()
    assignments = ", ".join(f"{column} = ?" for column in COLUMNS.split(", "))
    key = (record.attempt, record.step)
    if not db.execute(f"UPDATE snapshot SET {assignments} WHERE attempt = ? AND step = ?", (*row, *key)).rowcount:
        marks = ", ".join("?" * len(row))
        db.execute(f"INSERT INTO snapshot ({COLUMNS}) VALUES ({marks})", row)
