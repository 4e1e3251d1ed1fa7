"""Truncated, damaged and foreign files: what is whole is read, nothing wrong is ever shown."""

import random
import re
import shutil
import sqlite3

import numpy as np
import pytest

from repflow.monitor.sinks import RunFileError, open_run


@pytest.fixture(scope="module")
def count_whole(whole, read_quietly):
    """Counts the snapshots that can be read, each of which must be right; None where the file is refused."""
    expected = open_run(whole)

    def count(path) -> int | None:
        try:
            run, complaints = read_quietly(path)
        except RunFileError as error:
            assert str(path) in str(error)
            return None
        assert run.equals(expected[list(run)].sel(step=run["step"]))
        found = run.sizes["step"]
        if found < 60:
            (complaint,) = complaints
            assert re.search(f"({60 - found} of 60|unknown number of) snapshots", complaint)
        return found

    return count


def test_a_truncated_file_opens_as_far_as_it_is_whole(tmp_path, whole, count_whole):
    content = whole.read_bytes()
    cut, left = tmp_path / "cut.db", []
    sizes = sorted({1, 50, 99, 100, 4096, 4097, *np.linspace(5000, len(content) - 1, 30).astype(int)})
    for size in sizes:
        cut.write_bytes(content[:size])
        left.append(count_whole(cut))
    readable = [count for count in left if count is not None]
    assert left[:4] == [None] * 4
    assert all(count is not None for size, count in zip(sizes, left, strict=True) if size > 40_000)
    assert readable == sorted(readable)
    assert readable[-1] >= 50
    assert readable[len(readable) // 2] >= 15


def test_a_file_with_damaged_bytes_never_shows_a_wrong_value(tmp_path, whole, count_whole):
    content = whole.read_bytes()
    dice, bad, left = random.Random(0), tmp_path / "bad.db", []
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(dice.choice([1, 10, 100])):
            damaged[dice.randrange(len(content))] ^= dice.randrange(1, 256)
        bad.write_bytes(damaged)
        left.append(count_whole(bad))
    assert sum(count is not None for count in left) > 20
    assert max(filter(None, left)) >= 58


def test_a_lost_page_costs_the_snapshots_on_it(tmp_path, whole, count_whole):
    content = whole.read_bytes()
    bad, left = tmp_path / "bad.db", []
    for page in range(12, len(content) // 4096, 13):
        bad.write_bytes(content[: page * 4096] + bytes(4096) + content[(page + 1) * 4096 :])
        left.append(count_whole(bad))
    assert None not in left
    assert np.median([count for count in left if count is not None]) >= 58


def test_files_that_are_no_run_files(tmp_path, whole):
    (tmp_path / "empty.db").touch()
    (tmp_path / "notes.txt").write_text("inter-token similarity: high")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE snapshot (step)")
    db.close()
    shutil.copyfile(whole, tmp_path / "newer.db")
    with sqlite3.connect(tmp_path / "newer.db") as db:
        db.execute("PRAGMA user_version = 5")
    db.close()
    expected = {
        "empty.db": "an empty file; no run has been written to it",
        "notes.txt": "no SQLite database; check the path",
        "other.db": "another application; check the path",
        "newer.db": "format 5; .*upgrade repflow",
        "": "a directory; pass one of the run files in it: empty.db, newer.db, other.db",
    }
    for name, text in expected.items():
        with pytest.raises(RunFileError, match=f"expected a run file of repflow, found .*{text}"):
            open_run(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"missing.db: expected a run file, found nothing.*repflow-runs"):
        open_run(tmp_path / "missing.db")
