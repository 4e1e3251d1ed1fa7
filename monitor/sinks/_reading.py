"""Reads what is whole of a run file: while it is being written, from a read-only place, and damaged."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

from repflow.monitor.sinks._schema import COLUMNS, Record, RunFileError, has_alerts, identify
from repflow.monitor.snapshot import RunInfo

_LOCK_SECONDS = 10.0
_BEYOND = ("one whose head is damaged", "nothing can be read of it: fetch it again, or run again under another path=")


@dataclass(frozen=True)
class RunFile:
    """What a run file holds."""

    attempts: dict[int, RunInfo]
    """Number of the attempt -> its run, in ascending order; at least one."""
    records: list[Record]
    """Every whole row, in the order in which they were stored."""
    damage: str
    """What is lost, in a sentence that begins with the path; empty where the file is whole."""


def read_run_file(path: Path) -> RunFile:
    """Everything that is whole in the file, and a count of what is lost.

    Raises:
        FileNotFoundError: There is no such file.
        RunFileError: It is no run file, or nothing can be read of it, or not in this version.
    """
    identify(path)
    try:
        with _open(path) as db:
            attempts, bad_attempts = _attempts(db)
            records, stored = _records(db)
    except ValueError as error:
        raise RunFileError(
            f"{path}: expected runs that this version of repflow can read, but {error}; open it with the version that "
            "wrote it"
        ) from error
    except sqlite3.Error as error:
        busy = "locked" in str(error)
        found, remedy = ("one that another process has locked", "try again") if busy else _BEYOND
        raise RunFileError(f"{path}: expected a readable run file, found {found} ({error}); {remedy}") from error
    if not attempts:
        raise RunFileError("{}: expected a readable run file, found {}; {}".format(path, *_BEYOND))
    known = [record for record in records if record.attempt in attempts]
    lost = None if stored is None else stored - len(known)
    return RunFile(attempts, known, _damage(path, lost=lost, stored=stored, attempts=bad_attempts))


def copy_run_file(path: Path, target: Path) -> None:
    """Copy the file as it is now, with what is still in its log, into the single file `target`."""
    identify(path)
    with _open(path) as db, closing(sqlite3.connect(target)) as copy:
        db.execute("COMMIT")  # `backup` begins a transaction of its own
        db.backup(copy)


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection in the middle of a read transaction, that leaves the file alone."""
    with TemporaryDirectory(prefix="repflow-") as scratch:
        try:
            db = _begin(f"{path.absolute().as_uri()}?mode=ro")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            db = _begin(_without_writing_beside(path, Path(scratch)))
        with closing(db):
            yield db


def _without_writing_beside(path: Path, scratch: Path) -> str:
    """URI of the same content, for a directory in which SQLite cannot put the index of the log, or roll back.

    `immutable` ignores the log, so it is for a file without one; otherwise file and log are copied.
    """
    beside = [path.with_name(path.name + suffix) for suffix in ("-wal", "-journal")]
    logs = [log for log in beside if log.exists() and log.stat().st_size > 0]
    if not logs:
        return f"{path.absolute().as_uri()}?immutable=1"
    for file in (path, *logs):
        shutil.copyfile(file, scratch / file.name)
    return (scratch / path.name).as_uri()


def _begin(uri: str) -> sqlite3.Connection:
    db = sqlite3.connect(uri, uri=True, timeout=_LOCK_SECONDS, isolation_level=None)
    try:
        db.text_factory = bytes  # damaged text may be no UTF-8
        db.execute("PRAGMA writable_schema = ON")  # else SQLite refuses a file shorter than its header says
        db.execute("BEGIN")
        db.execute("SELECT 1 FROM sqlite_master").fetchall()
    except BaseException:
        db.close()
        raise
    return db


def _attempts(db: sqlite3.Connection) -> tuple[dict[int, RunInfo], int]:
    """The attempts, and how many could not be read."""
    attempts, bad = {}, 0
    for (number,) in db.execute("SELECT attempt FROM attempt ORDER BY attempt").fetchall():
        try:
            info, checksum = db.execute("SELECT info, crc32 FROM attempt WHERE attempt = ?", (number,)).fetchone()
        except sqlite3.DatabaseError:
            info, checksum = b"", None
        if isinstance(info, bytes) and crc32(info) == checksum:
            attempts[number] = RunInfo.from_json(info.decode())
        else:
            bad += 1
    return attempts, bad


def _records(db: sqlite3.Connection) -> tuple[list[Record], int | None]:
    """The whole rows, and how many were stored; None where that number is lost, too."""
    stored, columns = _stored(db), COLUMNS if has_alerts(db) else COLUMNS.replace("alerts", "NULL")
    rows: list[tuple[Any, ...]] = []
    try:
        rows.extend(db.execute(f"SELECT {columns} FROM snapshot ORDER BY id"))
    except sqlite3.DatabaseError:
        if stored is not None:
            rows = list(_row_by_row(db, stored, columns))
    found = (Record.from_row(row) for row in rows)
    return [record for record in found if record is not None], stored


def _stored(db: sqlite3.Connection) -> int | None:
    """The highest id that was ever given: ids begin at 1, and no row is ever deleted."""
    counts = "SELECT max(seq) FROM sqlite_sequence WHERE name = 'snapshot'", "SELECT max(id) FROM snapshot"
    found: list[int] = []
    for query in counts:
        try:
            (number,) = db.execute(query).fetchone()
        except sqlite3.DatabaseError:
            continue
        found.append(number if isinstance(number, int) else 0)
    return max(found, default=None)


def _row_by_row(db: sqlite3.Connection, stored: int, columns: str) -> Iterator[tuple[Any, ...]]:
    """Every row that can be reached on its own, past those whose pages are damaged."""
    for number in range(1, stored + 1):
        try:
            row = db.execute(f"SELECT {columns} FROM snapshot WHERE id = ?", (number,)).fetchone()
        except sqlite3.DatabaseError:
            continue
        if row is not None:
            yield row


def _damage(path: Path, *, lost: int | None, stored: int | None, attempts: int) -> str:
    if lost == 0 and not attempts:
        return ""
    snapshots = "an unknown number of" if lost is None else f"{lost} of {stored}"
    also = f", and the description of {attempts} attempts" if attempts else ""
    return f"{path}: damaged; {snapshots} snapshots{also} could not be read and are left out"
