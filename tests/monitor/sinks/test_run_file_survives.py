"""Kills, forks, full disks and read-only places: what was stored can always be read."""

import os
import re
import shutil
import signal

import pytest

from repflow.monitor.sinks import RunFileSink, open_run

WRITE_FOR_EVER = """
import itertools, time
from synthetic import make_run, make_snapshot
from repflow.monitor.sinks import RunFileSink
sink = RunFileSink("a.db")
sink.start(make_run())
for step in itertools.count():
    sink.write(make_snapshot(step))
    {flush}
    print(step, flush=True)
"""


@pytest.mark.parametrize("last", [0, 1, 7, 31, 32, 100])
def test_a_killed_run_holds_what_was_flushed(tmp_path, script, read_quietly, synthetic, assert_holds, last):
    process = script(WRITE_FOR_EVER.format(flush="sink.flush()"))
    for line in process.stdout:
        if int(line) == last:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run, complaints = read_quietly(tmp_path / "a.db")
    assert not complaints
    steps = list(run["step"].values)
    assert steps == list(range(len(steps)))
    assert len(steps) > last
    assert_holds(run.isel(step=-1), synthetic.make_snapshot(int(steps[-1])))


def test_a_run_killed_in_full_flight_can_be_resumed(tmp_path, script, read_quietly, synthetic):
    process = script(WRITE_FOR_EVER.format(flush=""))
    for line in process.stdout:
        if int(line) == 150:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first, complaints = read_quietly(tmp_path / "a.db")
    assert not complaints
    assert list(first["step"].values) == list(range(first.sizes["step"]))
    assert first.sizes["step"] > 150 - 64 - 1  # the queue holds 64
    sink = RunFileSink(tmp_path / "a.db")
    sink.start(synthetic.make_run())
    sink.write(synthetic.make_snapshot(40))
    sink.close()
    assert list(open_run(tmp_path / "a.db")["step"].values) == list(range(41))
    assert open_run(tmp_path / "a.db", attempt=1).sizes["step"] == first.sizes["step"]


def test_reading_while_the_run_is_written(tmp_path, script, read_quietly, synthetic, assert_holds):
    process = script(WRITE_FOR_EVER.format(flush="time.sleep(0.02)"))
    assert int(process.stdout.readline()) == 0
    seen = [0]
    while seen[-1] < 50:  # past a checkpoint
        run, complaints = read_quietly(tmp_path / "a.db")
        assert not complaints
        steps = list(run["step"].values)
        assert steps == list(range(len(steps)))
        assert len(steps) >= seen[-1]
        seen.append(len(steps))
        if steps:
            assert_holds(run.isel(step=-1), synthetic.make_snapshot(int(steps[-1])))
    assert process.poll() is None
    assert len(set(seen)) > 3


def test_the_end_of_the_process_stores_what_is_queued(tmp_path, run_script):
    run_script(
        "from synthetic import make_run, make_snapshot\n"
        "from repflow.monitor.sinks import RunFileSink\n"
        "sink = RunFileSink('a.db')\n"
        "sink.start(make_run())\n"
        "for step in range(60): sink.write(make_snapshot(step))\n"
    )
    assert open_run(tmp_path / "a.db").sizes["step"] == 60


def test_a_forked_child_writes_nothing(tmp_path, run_script):
    output = run_script("""
import os, sys
from synthetic import make_run, make_snapshot
from repflow.monitor.sinks import RunFileSink
sink = RunFileSink("a.db")
sink.start(make_run())
sink.write(make_snapshot(0))
child = os.fork()
if child == 0:
    try:
        sink.write(make_snapshot(1))
    except RuntimeError as error:
        print(error, flush=True)
    sink.flush()
    sink.close()
    del sink
    sys.exit(0)  # with all exit handlers
assert os.waitpid(child, 0)[1] == 0
sink.write(make_snapshot(2))
sink.close()
""")
    assert "forked" in output and "make a sink" in output
    assert list(open_run(tmp_path / "a.db")["step"].values) == [0, 2]


def test_a_full_disk_is_said_and_what_was_stored_stays(tmp_path, run_script, read_quietly, synthetic, assert_holds):
    output = run_script("""
import resource, time
from synthetic import make_run, make_snapshot
from repflow.monitor.sinks import RunFileError, RunFileSink
sink = RunFileSink("a.db")
sink.start(make_run())
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # Python ignores SIGXFSZ: writing fails
try:
    for step in range(2000):
        sink.write(make_snapshot(step))
        time.sleep(0.001)
except RunFileError as error:
    print(error)
try:
    sink.write(make_snapshot(step))
except RunFileError:
    print("still failing")
begun = time.monotonic()
sink.close()
sink.close()
assert time.monotonic() - begun < 5
""")
    assert re.search(rf"{tmp_path}/a.db: could not be written .*disk full.*Make room.*path=", output)
    assert "still failing" in output
    run, complaints = read_quietly(tmp_path / "a.db")
    assert not complaints
    steps = list(run["step"].values)
    assert len(steps) > 10
    assert steps == list(range(len(steps)))
    assert_holds(run.isel(step=-1), synthetic.make_snapshot(int(steps[-1])))


def test_a_full_disk_at_the_last_snapshot_is_said_by_close(tmp_path, run_script):
    output = run_script("""
import resource
from synthetic import make_run, make_snapshot
from repflow.monitor.sinks import RunFileError, RunFileSink
sink = RunFileSink("a.db")
sink.start(make_run())
sink.write(make_snapshot(0))
sink.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sink.write(make_snapshot(1))
try:
    sink.close()
except RunFileError as error:
    print(error)
""")
    assert "Make room" in output
    assert list(open_run(tmp_path / "a.db")["step"].values) == [0]


# Root may write anywhere: without its capabilities, it is bound by the permissions of files like everyone.
READ_WITHOUT_PRIVILEGES = """
import ctypes, os, sys
from repflow.monitor.sinks import open_run
header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, nothing) == 0
try:
    open("place/new", "w")
    sys.exit("the directory can be written to")
except PermissionError:
    print(*open_run("place/a.db")["step"].values)
"""


@pytest.mark.parametrize("killed", [False, True], ids=["finished", "killed"])
def test_a_read_only_directory(tmp_path, script, run_script, whole, killed):
    place = tmp_path / "place"
    place.mkdir()
    if killed:
        process = script(WRITE_FOR_EVER.format(flush="sink.flush()"))
        for line in process.stdout:
            if int(line) == 20:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        expected = open_run(tmp_path / "a.db")["step"].values
        for name in ("a.db", "a.db-wal"):  # without the index of the log, which cannot be made there
            shutil.copy(tmp_path / name, place / name)
    else:
        shutil.copy(whole, place / "a.db")
        expected = range(60)
    place.chmod(0o555)
    try:
        assert run_script(READ_WITHOUT_PRIVILEGES).split() == [str(step) for step in expected]
    finally:
        place.chmod(0o755)
    assert sorted(entry.name for entry in place.iterdir()) == (["a.db", "a.db-wal"] if killed else ["a.db"])
