import warnings

import pytest

from repflow.monitor import RepflowWarning
from repflow.monitor.sinks import AbstractSink, FanOutSink, NullSink, RunFileSink, open_run


class Recorder(AbstractSink):
    def __init__(self, fails_at=()):
        self.calls, self.fails_at = [], fails_at

    def _called(self, call):
        self.calls.append(call)
        if call in self.fails_at:
            raise OSError(f"cannot {call}")

    def start(self, run):
        self._called("start")

    def write(self, snapshot):
        self._called(snapshot.step)

    def flush(self):
        self._called("flush")

    def close(self):
        self._called("close")


def test_everything_reaches_everyone_in_order(synthetic):
    sinks = [Recorder(), NullSink(), Recorder()]
    fan = FanOutSink(sinks)
    fan.start(synthetic.make_run())
    fan.write(synthetic.make_snapshot(3))
    fan.flush()
    fan.close()
    assert sinks[0].calls == sinks[2].calls == ["start", 3, "flush", "close"]


@pytest.mark.parametrize("where", ["start", 1, "flush"])
def test_a_failing_sink_is_dropped_closed_and_said_once(synthetic, where):
    bad, good = Recorder(fails_at=(where, "close")), Recorder()
    fan = FanOutSink([bad, good])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fan.start(synthetic.make_run())
        for step in range(4):
            fan.write(synthetic.make_snapshot(step))
        fan.flush()
        fan.close()
        fan.close()
    assert [warning.category for warning in caught] == [RepflowWarning]
    text = str(caught[0].message)
    assert "Recorder" in text and f"cannot {where}" in text and "mend the cause" in text
    assert bad.calls[-2:] == [where, "close"]
    assert good.calls == ["start", 0, 1, 2, 3, "flush", "close", "close"]
    assert fan.sinks == (good,)


def test_warnings_as_errors_raise_nothing_and_leave_the_others_whole(synthetic, capsys):
    good = Recorder()
    fan = FanOutSink([Recorder(fails_at=(0,)), good])
    fan.start(synthetic.make_run())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fan.write(synthetic.make_snapshot(0))
    assert "Recorder failed" in capsys.readouterr().err
    fan.write(synthetic.make_snapshot(1))
    assert good.calls == ["start", 0, 1]


def test_a_run_file_that_cannot_be_written_leaves_the_other(tmp_path, synthetic):
    (tmp_path / "notes.db").write_text("mine")
    fan = FanOutSink([RunFileSink(tmp_path / "notes.db"), RunFileSink(tmp_path / "good.db")])
    with pytest.warns(RuntimeWarning, match="RunFileSink failed.*notes.db: expected a run file"):
        fan.start(synthetic.make_run())
    fan.write(synthetic.make_snapshot(0))
    fan.close()
    assert open_run(tmp_path / "good.db").sizes["step"] == 1
    assert (tmp_path / "notes.db").read_text() == "mine"


def test_a_new_start_tries_everyone_again(synthetic):
    sink = Recorder(fails_at=(0,))
    fan = FanOutSink([sink])
    fan.start(synthetic.make_run())
    with pytest.warns(RuntimeWarning):
        fan.write(synthetic.make_snapshot(0))
    fan.start(synthetic.make_run())
    fan.write(synthetic.make_snapshot(1))
    assert sink.calls == ["start", 0, "close", "start", 1]


def test_what_is_no_sink_is_refused(run_script):
    """Outside of pytest, where no import hook checks the types of arguments first."""
    output = run_script("""
from repflow.monitor.sinks import FanOutSink, NullSink
for wrong in (NullSink, "run.db"):
    try:
        FanOutSink([NullSink(), wrong])
    except TypeError as error:
        print(error)
""")
    assert output.count("expected sinks such as RunFileSink(), got") == 2
