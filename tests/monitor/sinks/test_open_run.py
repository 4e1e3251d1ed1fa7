import json
import sqlite3
import time
import warnings
from contextlib import closing
from zlib import crc32

import numpy as np
import pytest
import xarray

from repflow.monitor import RepflowWarning
from repflow.monitor.sinks import RunFileError, RunFileSink, open_run
from repflow.monitor.sinks.open_run import _AT_A_TIME
from repflow.monitor.snapshot import RunInfo, Snapshot
from repflow.monitor.sum_layout import SumLayout


@pytest.fixture
def write(synthetic):
    def write(path, steps, num_states=6, **changes):
        sink = RunFileSink(path)
        sink.start(synthetic.make_run(num_states))
        for step in steps:
            sink.write(synthetic.make_snapshot(step, num_states, **changes))
        sink.close()
        return path

    return write


@pytest.mark.parametrize("num_states", [2, 3, 6, 33])
def test_every_value_comes_back_bit_by_bit(tmp_path, synthetic, write, assert_holds, num_states):
    before = time.time()
    run = open_run(write(tmp_path / "a.db", range(0, 70, 10), num_states))
    assert run.sizes == {
        "step": 7,
        "state": num_states,
        "state_b": num_states,
        "transition": num_states - 1,
        "position": 64,
    }
    for row, step in enumerate(range(0, 70, 10)):
        assert_holds(run.isel(step=row), synthetic.make_snapshot(step, num_states))
    assert np.all((before <= run["time"]) & (run["time"] <= time.time()))


def test_a_long_run_is_read_in_parts(tmp_path, synthetic, write, assert_holds):
    """More windows than are laid out at a time, and a last part that is not full."""
    steps = range(0, 700, 10)
    assert len(steps) > 2 * _AT_A_TIME and len(steps) % _AT_A_TIME
    run = open_run(write(tmp_path / "a.db", steps, 3))
    assert run["step"].values.tolist() == list(steps)
    for row, step in enumerate(steps):
        assert_holds(run.isel(step=row), synthetic.make_snapshot(step, 3))


def test_dims_dtypes_coords_and_attributes(tmp_path, write):
    run = open_run(write(tmp_path / "a.db", [5]))
    dims = {name: array.dims[1:] for name, array in run.data_vars.items()}
    per_step = dict.fromkeys(
        ("v_loc", "v_glob", "v_loc_rel", "v_glob_rel", "overhead_ms", "time", "tokens", "sequences", "loss"), ()
    )
    per_state = dict.fromkeys(
        ("inter_token", "norms", "local_variance", "hsic_top_token", "nonfinite", "zero"), ("state",)
    )
    per_transition = dict.fromkeys(("update_inter_token", "adjacent"), ("transition",))
    maps = {"cka": ("state", "state_b"), "adjacent_tokens": ("transition", "position")}
    assert dims == per_step | per_state | per_transition | maps
    integers = {"nonfinite", "zero", "tokens", "sequences"}
    assert {name: array.dtype.str for name, array in run.data_vars.items()} == {
        name: "<i8" if name in integers else "<f8" for name in dims
    }
    assert all(array.attrs["long_name"] and array.attrs["units"] for array in run.data_vars.values())
    assert run["step"].dtype == np.int64
    assert list(run["block_kind"].values) == ["ssm", "attention", "ssm", "attention", "ssm"]
    assert list(run["block_name"].values) == [f"layers.{i}" for i in range(5)]
    np.testing.assert_allclose(run["position"], (np.arange(64) + 0.5) / 64)
    assert (run.attrs["name"], run.attrs["stream"], run.attrs["model_class"]) == ("run", "residual", "Tiny")
    assert (run.attrs["parameters"], run.attrs["attempt"]) == (1234, 1)
    assert (run.attrs["cka_estimator"], run.attrs["states"]) == ("unbiased", "residual")
    assert json.loads(run.attrs["config"])["every_n_steps"] == 50
    assert "torch" in json.loads(run.attrs["versions"])


@pytest.mark.parametrize("window", [1, 2, 3, 7, 10, 100])
def test_a_window_is_the_ratio_of_the_merged_sums(tmp_path, synthetic, write, assert_holds, window):
    steps = list(range(0, 200, 20))
    run = open_run(write(tmp_path / "a.db", steps), window=window)
    layout = SumLayout(6)
    parts = [steps[start : start + window] for start in range(0, len(steps), window)]
    assert list(run["step"].values) == [part[-1] for part in parts]
    for row, part in enumerate(parts):
        merged = synthetic.make_sums(part[0])
        for step in part[1:]:
            layout.merge_(merged, synthetic.make_sums(step))
        expected = Snapshot.from_sums(
            merged,
            num_states=6,
            step=part[-1],
            stream="residual",
            overhead_ms=float(np.mean([step + 0.5 for step in part])),
            scalars={"loss": float(np.mean([1.0 / (step + 1) for step in part]))},
        )
        assert_holds(run.isel(step=row), expected)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_that_is_none(tmp_path, write, window):
    with pytest.raises(ValueError, match="window="):
        open_run(write(tmp_path / "a.db", [0]), window=window)


def test_a_run_without_snapshots(tmp_path, write):
    run = open_run(write(tmp_path / "a.db", []))
    assert run.sizes["step"] == 0
    assert run["cka"].shape == (0, 6, 6)
    assert run["nonfinite"].dtype == np.int64


def test_scalars_that_come_and_go(tmp_path, synthetic):
    sink = RunFileSink(tmp_path / "a.db")
    sink.start(synthetic.make_run())
    sink.write(synthetic.make_snapshot(0, scalars={}))
    sink.write(synthetic.make_snapshot(1, scalars={"loss": 2.0, "norms": 7.0, "step": 3.0}))
    sink.write(synthetic.make_snapshot(2, scalars={"loss": float("inf")}, overhead_ms=float("nan")))
    sink.close()
    run = open_run(tmp_path / "a.db")
    np.testing.assert_array_equal(run["loss"], [np.nan, 2.0, np.inf])
    np.testing.assert_array_equal(run["scalar_norms"], [np.nan, 7.0, np.nan])
    np.testing.assert_array_equal(run["scalar_step"], [np.nan, 3.0, np.nan])
    assert run["norms"].dims == ("step", "state")
    np.testing.assert_array_equal(run["overhead_ms"], [0.5, 1.5, np.nan])
    np.testing.assert_array_equal(open_run(tmp_path / "a.db", window=3)["loss"], [np.inf])


def test_a_resumed_run_goes_on_where_the_later_attempt_began(tmp_path, synthetic, write, assert_holds):
    path = write(tmp_path / "a.db", [0, 50, 100, 150])
    write(path, [100, 150, 200], overhead_ms=7.0)
    run = open_run(path)
    assert list(run["step"].values) == [0, 50, 100, 150, 200]
    assert list(run["overhead_ms"].values) == [0.5, 50.5, 7.0, 7.0, 7.0]
    assert run.attrs["attempt"] == 2
    first, second = open_run(path, attempt=1), open_run(path, attempt=2)
    assert list(first["step"].values) == [0, 50, 100, 150]
    assert list(second["step"].values) == [100, 150, 200]
    assert (first.attrs["attempt"], second.attrs["attempt"]) == (1, 2)
    assert_holds(first.isel(step=2), synthetic.make_snapshot(100))


def test_three_attempts_and_a_rerun_from_the_start(tmp_path, write):
    path = write(tmp_path / "a.db", [0, 10, 20, 30])
    write(path, [20, 30, 40])
    write(path, [10, 20])
    assert list(open_run(path)["step"].values) == [0, 10, 20]
    write(path, [])  # has measured nothing yet
    assert list(open_run(path)["step"].values) == [0, 10, 20]
    assert open_run(path).attrs["attempt"] == 4
    write(path, [0, 10])
    assert list(open_run(path)["step"].values) == [0, 10]


def test_attempts_of_another_depth_are_left_out_and_said(tmp_path, write):
    path = write(tmp_path / "a.db", [0, 10], num_states=4)
    write(path, [5], num_states=6)
    with pytest.warns(RepflowWarning, match="^repflow: .*attempts 1 are left out.*6 states.*attempt="):
        run = open_run(path)
    assert (list(run["step"].values), run.sizes["state"]) == ([5], 6)
    assert run.attrs["warnings"].startswith(f"{path}: attempts 1 are left out")
    assert open_run(path, attempt=1).sizes == {"step": 2, "state": 4, "state_b": 4, "transition": 3, "position": 64}


def test_an_attempt_that_the_file_does_not_hold(tmp_path, write):
    path = write(tmp_path / "a.db", [0])
    write(path, [0])
    with pytest.raises(ValueError, match=r"one of 1, 2.*got 3"):
        open_run(path, attempt=3)


def test_a_dataset_can_be_saved_and_averaged(tmp_path, write):
    run = open_run(str(write(tmp_path / "a.db", range(5))))
    assert isinstance(run, xarray.Dataset)
    assert run.isel(state=slice(2, 4))["inter_token"].mean("state").dims == ("step",)
    assert run.where(run["block_kind"] == "ssm", drop=True).sizes["transition"] == 3


def test_a_whole_run_opens_without_a_warning(tmp_path, write):
    path = write(tmp_path / "a.db", [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_run(path).attrs["warnings"] == ""


def test_warnings_as_errors_do_not_keep_a_run_from_opening(tmp_path, write, capsys):
    path = write(tmp_path / "a.db", [0], num_states=4)
    write(path, [5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(open_run(path)["step"].values) == [5]
    assert "attempts 1 are left out" in capsys.readouterr().err


@pytest.fixture
def describe(tmp_path, write):
    """Writes a run whose description is changed, as another version might have written it."""

    def describe(change):
        path = write(tmp_path / "a.db", [0])
        with closing(sqlite3.connect(path)) as db, db:
            info = json.loads(db.execute("SELECT info FROM attempt").fetchone()[0])
            change(info)
            text = json.dumps(info)
            db.execute("UPDATE attempt SET info = ?, crc32 = ?", (text, crc32(text.encode())))
        return path

    return describe


def test_a_description_with_more_keys_than_are_known(describe):
    def add(info):
        info["host"] = "somewhere"
        info["blocks"][0]["heads"] = 8

    assert open_run(describe(add)).attrs["name"] == "run"


@pytest.mark.parametrize("key", ["name", "blocks", "model_class"])
def test_a_description_that_lacks_a_key(describe, key):
    path = describe(lambda info: info.pop(key))
    with pytest.raises(RunFileError, match=rf"a\.db: expected runs that this version .*lacks a key: .*{key}"):
        open_run(path)


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"blocks": [1]}'])
def test_a_description_that_is_none(text):
    with pytest.raises(ValueError):
        RunInfo.from_json(text)
