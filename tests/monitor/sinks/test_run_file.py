import gc
import os
import re
import sqlite3
import threading
import time
import weakref
from zlib import crc32

import numpy as np
import pytest

from repflow.monitor.sinks import RunFileError, RunFileSink, open_run
from repflow.monitor.sinks._journal import journal_mode


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("repflow: run file")]


@pytest.fixture
def sink(tmp_path, synthetic):
    sink = RunFileSink(tmp_path / "a.db")
    sink.start(synthetic.make_run())
    yield sink
    sink.close()


def test_the_default_path_is_named_after_the_run(tmp_path, synthetic, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunFileSink().path is None
    sink = RunFileSink()
    for name, file in [("gpt", "gpt"), ("org/model v2", "org-model-v2-[0-9a-f]{8}"), ("../..", "run-[0-9a-f]{8}")]:
        sink.start(synthetic.make_run(name=name))
        sink.close()
        assert sink.path is not None
        assert sink.path.parent == tmp_path / "repflow-runs"
        assert re.fullmatch(file + r"\.db", sink.path.name)
        assert open_run(sink.path).attrs["name"] == name


def test_every_name_of_a_run_gives_a_file_of_its_own(tmp_path, synthetic):
    names = ["x" * 300, "x" * 301, "模型" * 100, "a/b", "a-b", "a b", "x" * 199 + "é"]
    paths = set()
    for name in names:
        sink = RunFileSink(directory=tmp_path)
        sink.start(synthetic.make_run(name=name))
        sink.write(synthetic.make_snapshot(0))
        sink.close()
        assert sink.path is not None
        assert open_run(sink.path).attrs["name"] == name
        paths.add(sink.path)
    assert len(paths) == len(names)
    assert tmp_path / "a-b.db" in paths  # a name that need not be changed is the file's


def test_the_file_as_it_is_stored(tmp_path, sink, synthetic):
    snapshot = synthetic.make_snapshot(3)
    sink.write(snapshot)
    sink.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.db"]  # no log, no index: one plain file
    with sqlite3.connect(tmp_path / "a.db") as db:
        assert db.execute("PRAGMA application_id").fetchone()[0] == int.from_bytes(b"rflo", "big")
        assert db.execute("PRAGMA user_version").fetchone()[0] == 3
        attempt, info, checksum = db.execute("SELECT attempt, info, crc32 FROM attempt").fetchone()
        assert (attempt, info, checksum) == (1, synthetic.make_run().to_json(), crc32(info.encode()))
        step, sums, scalars = db.execute("SELECT step, sums, scalars FROM snapshot").fetchone()
    db.close()
    np.testing.assert_array_equal(np.frombuffer(sums, "<f8"), snapshot.sums.numpy())
    assert (step, scalars) == (3, '{"loss": 0.25}')


def test_the_log_is_used_while_writing_and_emptied_now_and_then(tmp_path, sink, synthetic):
    log = tmp_path / "a.db-wal"
    sink.write(synthetic.make_snapshot(0))
    sink.flush()
    assert log.stat().st_size > 0
    for step in range(1, 32):
        sink.write(synthetic.make_snapshot(step))
    sink.flush()
    assert log.stat().st_size == 0


def test_a_step_written_twice_is_replaced(tmp_path, sink, synthetic, assert_holds):
    for step in (0, 1, 2):
        sink.write(synthetic.make_snapshot(step))
    other = synthetic.make_snapshot(1, sums=synthetic.make_sums(99), overhead_ms=3.0)
    sink.write(other)
    sink.close()
    run = open_run(tmp_path / "a.db")
    assert list(run["step"].values) == [0, 1, 2]
    assert_holds(run.sel(step=1), other)


def test_flush_makes_everything_readable(tmp_path, sink, synthetic):
    for step in range(20):
        sink.write(synthetic.make_snapshot(step))
    sink.flush()
    assert list(open_run(tmp_path / "a.db")["step"].values) == list(range(20))


def test_a_snapshot_is_free_as_soon_as_it_is_written(sink, synthetic):
    snapshot = synthetic.make_snapshot(0)
    alive = weakref.ref(snapshot.sums)
    sink.write(snapshot)
    del snapshot
    assert alive() is None


def test_changing_the_sums_after_write_changes_nothing(tmp_path, sink, synthetic, assert_holds):
    snapshot = synthetic.make_snapshot(0)
    sink.write(snapshot)
    snapshot.sums.zero_()
    sink.close()
    assert_holds(open_run(tmp_path / "a.db").isel(step=0), synthetic.make_snapshot(0))


def test_calls_out_of_order(tmp_path, synthetic):
    sink = RunFileSink(tmp_path / "a.db")
    sink.flush()
    sink.close()
    with pytest.raises(RuntimeError, match="start"):
        sink.write(synthetic.make_snapshot(0))
    sink.start(synthetic.make_run())
    sink.close()
    sink.close()
    sink.flush()
    with pytest.raises(RuntimeError, match="already closed"):
        sink.write(synthetic.make_snapshot(0))
    sink.start(synthetic.make_run())  # a second attempt
    sink.write(synthetic.make_snapshot(0))
    sink.start(synthetic.make_run())  # a third, without closing
    sink.close()
    assert list(open_run(tmp_path / "a.db", attempt=2)["step"].values) == [0]
    assert open_run(tmp_path / "a.db").attrs["attempt"] == 3


def test_a_snapshot_of_another_depth_is_refused(sink, synthetic):
    with pytest.raises(ValueError, match=r"expected \d+ sums"):
        sink.write(synthetic.make_snapshot(0, 7))


def test_a_dropped_sink_stores_its_queue_and_ends_its_thread(tmp_path, synthetic):
    sink = RunFileSink(tmp_path / "a.db")
    sink.start(synthetic.make_run())
    sink.write(synthetic.make_snapshot(0))
    (thread,) = writers()
    del sink
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    assert list(open_run(tmp_path / "a.db")["step"].values) == [0]


def test_what_is_there_already_is_not_overwritten(tmp_path, synthetic):
    (tmp_path / "notes.db").write_text("not a database, but dear to somebody")
    for path in (tmp_path / "notes.db", tmp_path):
        with pytest.raises(RunFileError, match="expected a run file"):
            RunFileSink(path).start(synthetic.make_run())
    assert (tmp_path / "notes.db").read_text().startswith("not a database")
    with pytest.raises(RunFileError, match=r"could not be written.*directory"):
        RunFileSink(tmp_path / "notes.db" / "a.db").start(synthetic.make_run())


def test_an_empty_file_becomes_a_run_file(tmp_path, synthetic):
    (tmp_path / "a.db").touch()
    sink = RunFileSink(tmp_path / "a.db")
    sink.start(synthetic.make_run())
    sink.close()
    assert open_run(tmp_path / "a.db").sizes["step"] == 0


def test_two_writers_at_a_time_are_told(tmp_path, sink, synthetic):
    sink.write(synthetic.make_snapshot(0))
    sink.flush()
    other = RunFileSink(tmp_path / "a.db")
    other.start(synthetic.make_run())
    other.write(synthetic.make_snapshot(1))
    other.flush()
    sink.write(synthetic.make_snapshot(2))
    with pytest.raises(RunFileError, match=r"attempt 1 was being written when .* opened attempt 2.*path="):
        sink.flush()
    other.close()
    assert list(open_run(tmp_path / "a.db")["step"].values) == [0, 1]


def test_a_reader_that_holds_on_does_not_hold_up_the_writer(tmp_path, sink, synthetic):
    sink.write(synthetic.make_snapshot(0))
    sink.flush()
    reader = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM snapshot").fetchone() == (1,)
    begun = time.monotonic()
    for step in range(1, 20):
        sink.write(synthetic.make_snapshot(step))
    sink.close()
    assert time.monotonic() - begun < 10
    assert reader.execute("SELECT count(*) FROM snapshot").fetchone() == (1,)
    reader.close()
    assert open_run(tmp_path / "a.db").sizes["step"] == 20


MOUNTS = """\
22 1 0:21 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/me/fast\\040disk rw - xfs /dev/sdb1 rw
32 22 0:42 / /mnt/remote rw master:1 propagate_from:2 - fuse.sshfs me@host:/ rw
33 22 0:43 / /scratch rw - ext4 /dev/sdc1 rw
34 22 0:44 / /scratch rw - lustre 10.0.0.1@o2ib:/scratch rw
a line that says nothing
"""


@pytest.mark.parametrize(
    ("directory", "mode"),
    [
        ("/", "WAL"),
        ("/homework", "WAL"),
        ("/home", "DELETE"),
        ("/home/me/runs", "DELETE"),
        ("/home/me/fast disk/runs", "WAL"),
        ("/mnt/remote/x", "DELETE"),
        ("/scratch/x", "DELETE"),
    ],
)
def test_network_file_systems_get_no_shared_memory(tmp_path, directory, mode):
    assert journal_mode(type(tmp_path)(directory), MOUNTS) == mode


def test_a_file_without_log_works_the_same(tmp_path, synthetic, monkeypatch, assert_holds):
    monkeypatch.setattr("repflow.monitor.sinks.run_file.journal_mode", lambda directory: "DELETE")
    sink = RunFileSink(tmp_path / "a.db")
    sink.start(synthetic.make_run())
    for step in range(40):
        sink.write(synthetic.make_snapshot(step))
    sink.flush()
    assert not (tmp_path / "a.db-wal").exists()
    assert_holds(open_run(tmp_path / "a.db").isel(step=39), synthetic.make_snapshot(39))
    sink.close()


def test_a_pipe_is_no_run_file(tmp_path, synthetic):
    os.mkfifo(tmp_path / "a.db")
    with pytest.raises(RunFileError, match="found a pipe or a device"):
        RunFileSink(tmp_path / "a.db").start(synthetic.make_run())
    with pytest.raises(RunFileError, match="found a pipe or a device"):
        open_run(tmp_path / "a.db")
