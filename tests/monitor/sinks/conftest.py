import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from repflow.monitor.sinks import RunFileSink, open_run

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def synthetic():
    """The module `synthetic`, which the scripts that tests run import by its name."""
    spec = importlib.util.spec_from_file_location("synthetic", HERE / "synthetic.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path):
    """Starts Python code in another process, in `tmp_path`, where it can import `synthetic`."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_script(script):
    """Runs Python code in another process to its end and returns what it printed."""

    def run(code: str) -> str:
        process = script(code)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return output

    return run


@pytest.fixture
def assert_holds():
    """Checks one row of a dataset against the snapshot that it must come from, bit by bit."""

    def check(row, snapshot) -> None:
        for name in row.data_vars:
            if name in ("time", *snapshot.scalars):
                continue
            value = np.asarray(getattr(snapshot, name))
            if name == "local_variance":
                value = np.concatenate([[np.nan], value, [np.nan]])
            np.testing.assert_array_equal(row[name].values, value, err_msg=str(name))
        for name, value in snapshot.scalars.items():
            assert float(row[name]) == value
        assert int(row["step"]) == snapshot.step

    return check


@pytest.fixture(scope="session")
def read_quietly():
    """Opens a run; returns it with the warnings of damage."""

    def read(path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = open_run(path)
        return run, [str(warning.message) for warning in caught if "damaged" in str(warning.message)]

    return read


@pytest.fixture(scope="session")
def whole(tmp_path_factory, synthetic):
    """A finished run file of 60 snapshots in two attempts."""
    path = tmp_path_factory.mktemp("whole") / "whole.db"
    for steps in (range(40), range(40, 60)):
        sink = RunFileSink(path)
        sink.start(synthetic.make_run())
        for step in steps:
            sink.write(synthetic.make_snapshot(step))
        sink.close()
    return path
