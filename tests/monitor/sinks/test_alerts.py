"""Alerts in every sink: stored with their snapshot, sent once, and as 0/1 curves."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from repflow.monitor import RepflowWarning
from repflow.monitor.sinks import LoggerSink, RunFileSink, WandbSink, open_run
from repflow.monitor.sinks._keys import scalar_items
from repflow.monitor.sinks._schema import Record


@pytest.fixture(autouse=True)
def quiet_and_offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    yield
    if wandb.run is not None:
        wandb.finish()


@pytest.fixture
def series(synthetic):
    """Six snapshots; that of step 30 raises two alerts, that of step 50 one."""
    alerts = {
        30: (synthetic.make_alert(30), synthetic.make_alert(30, signature="dead_blocks", severity="info", states=(4,))),
        50: (synthetic.make_alert(50),),
    }
    made = []
    for step in range(0, 60, 10):
        signatures = {"nonfinite": step in (30, 50), "dead_blocks": step >= 30}
        made.append(replace(synthetic.make_snapshot(step), alerts=alerts.get(step, ()), signatures=signatures))
    return made


def write(sink, run, snapshots):
    sink.start(run)
    for snapshot in snapshots:
        sink.write(snapshot)
    sink.close()


def stored(path: Path, **options) -> list[dict]:
    return json.loads(open_run(path, **options).attrs["alerts"])


def test_a_run_file_gives_them_back_as_they_were(tmp_path, synthetic, series):
    path = tmp_path / "a.db"
    write(RunFileSink(path), synthetic.make_run(), series)
    expected = [alert.to_dict() for snapshot in series for alert in snapshot.alerts]
    assert stored(path) == expected == stored(path, window=4)
    assert [alert["step"] for alert in expected] == [30, 30, 50]


def test_a_file_without_any(tmp_path, synthetic, series):
    path = tmp_path / "a.db"
    write(RunFileSink(path), synthetic.make_run(), series[:3])
    assert stored(path) == []


def test_those_of_a_superseded_attempt_are_left_out(tmp_path, synthetic, series):
    path = tmp_path / "a.db"
    for steps in (series, series[4:5]):  # the second goes on from a checkpoint of step 40, and raises nothing
        write(RunFileSink(path), synthetic.make_run(), steps)
    assert [alert["step"] for alert in stored(path)] == [30, 30]
    assert [alert["step"] for alert in stored(path, attempt=1)] == [30, 30, 50]


def test_a_file_of_before_there_were_alerts_opens_and_is_continued(tmp_path, synthetic, series):
    path = tmp_path / "old.db"
    write(RunFileSink(path), synthetic.make_run(), series[:2])
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE snapshot DROP COLUMN alerts")
        columns = "attempt, step, written, overhead_ms, scalars, sums, NULL, crc32"
        for row in db.execute(f"SELECT {columns} FROM snapshot").fetchall():
            attempt, step, written, overhead, scalars, sums, *_ = row
            older = Record(attempt, step, written, overhead, scalars.encode(), sums[:-16])  # nor two sums
            db.execute("UPDATE snapshot SET sums = ?, crc32 = ? WHERE step = ?", (older.sums, older.checksum, step))
        db.execute("PRAGMA user_version = 1")
        db.commit()
    before = open_run(path)
    assert before.attrs["warnings"] == "" and before.attrs["alerts"] == "[]"
    assert before["step"].values.tolist() == [0, 10]
    write(RunFileSink(path), synthetic.make_run(), series[2:])
    after = open_run(path)
    assert after["step"].values.tolist() == [0, 10, 20, 30, 40, 50]
    assert after.attrs["warnings"] == "" and len(json.loads(after.attrs["alerts"])) == 3


def test_a_damaged_alert_costs_its_snapshot_alone(tmp_path, synthetic, series):
    path = tmp_path / "a.db"
    write(RunFileSink(path), synthetic.make_run(), series)
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE snapshot SET alerts = replace(alerts, 'finite', 'fimite') WHERE step = 30")
        db.commit()
    with pytest.warns(RepflowWarning, match="damaged; 1 of 6 snapshots"):
        run = open_run(path)
    assert run["step"].values.tolist() == [0, 10, 20, 40, 50]
    assert [alert["step"] for alert in json.loads(run.attrs["alerts"])] == [50]


def test_curves_are_one_while_raised(series):
    curves = [scalar_items(snapshot, separator=".") for snapshot in series]
    assert [curve["repflow.alerts.nonfinite"] for curve in curves] == [0, 0, 0, 1, 0, 1]
    assert [curve["repflow.alerts.dead_blocks"] for curve in curves] == [0, 0, 0, 1, 1, 1]


def test_tensorboard_gets_text_and_csv_the_curves(tmp_path, synthetic, series):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, table = TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")
    write(LoggerSink([board, table], heatmaps=False), synthetic.make_run(), series)
    board.finalize("success")
    table.save()
    events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0}).Reload()
    texts = events.Tensors("repflow/alerts/text_summary")
    assert [event.step for event in texts] == [30, 30, 50]
    assert texts[0].tensor_proto.string_val[0].decode() == (
        "**error: Values are not finite**\n\n3 tokens at state 2 – “layers.1”.\n\nGo back."
    )
    assert [event.value for event in events.Scalars("repflow/alerts/nonfinite")] == [0, 0, 0, 1, 0, 1]
    assert "repflow/alerts/dead_blocks" in (Path(table.log_dir) / "metrics.csv").read_text().splitlines()[0]


def records(run, kind: str) -> list[dict]:
    """What a finished offline run recorded, read back from its file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(Path(run.dir).parent)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [record[kind] for record in map(json.loads, text.splitlines()) if record["type"] == kind]


def check_wandb(run, num_keys_hidden: int):
    """What W&B was told: alerts, panels and summaries."""
    alerts = records(run, "alert")
    assert [(alert["title"], alert["level"]) for alert in alerts] == [
        ("Values are not finite", "ERROR"),
        ("Values are not finite", "INFO"),
        ("Values are not finite", "ERROR"),
    ]
    assert alerts[0]["text"] == "Step 30: 3 tokens at state 2 – “layers.1”. Go back."
    metrics = {metric["name"]: metric for metric in records(run, "metric") if "name" in metric}
    ours = {name: metric for name, metric in metrics.items() if name.startswith("repflow/")}
    assert {metric["step_metric"] for name, metric in ours.items() if "heatmap" not in name} == {"repflow/step"}
    hidden = [name for name, metric in ours.items() if metric["options"].get("hidden")]
    assert len(hidden) == num_keys_hidden
    assert "repflow/inter_token/state_06" in hidden and "repflow/inter_token/state_07" not in hidden
    assert "repflow/adjacent/transition_09" not in hidden
    summary: dict = {}
    for record in records(run, "summary"):
        for key, value in record["update"].items():
            merge = isinstance(value, dict) and isinstance(summary.get(key), dict)
            summary[key] = summary[key] | value if merge else value
    assert summary["repflow/alerts/nonfinite"] == {"max": 1}
    assert set(summary["repflow/overhead_ms"]) == {"mean"} and set(summary["repflow/zero"]) == {"max"}
    assert isinstance(summary["repflow/v_loc"], float)


@pytest.fixture
def deep_series(synthetic, series):
    """The same with 11 states."""
    return [
        replace(synthetic.make_snapshot(each.step, 11), alerts=each.alerts, signatures=each.signatures)
        for each in series
    ]


def test_wandb_sink(tmp_path, synthetic, deep_series):
    sink = WandbSink(project="try", dir=tmp_path, heatmaps=False)
    sink.start(synthetic.make_run(11))
    run = wandb.run
    for snapshot in deep_series:
        sink.write(snapshot)
    sink.close()
    check_wandb(run, num_keys_hidden=HIDDEN_OF_11)


HIDDEN_OF_11 = 1 + 4 * 6 + 2 * 5
"""The axis; of 4 quantities by state, and of 2 by transition, all but the first, the last and the quarters between."""


def test_wandb_logger_gets_the_run_file_too(tmp_path, synthetic, deep_series):
    logger = WandbLogger(project="try", save_dir=tmp_path, offline=True)
    run_file = RunFileSink(tmp_path / "a.db")
    sink = LoggerSink([logger], heatmaps=False, run_file=run_file)
    for each in (run_file, sink):
        each.start(synthetic.make_run(11))
    for snapshot in deep_series:
        for each in (run_file, sink):
            each.write(snapshot)
    for _ in range(2):
        for each in (run_file, sink):
            each.close()
    run = logger.experiment
    run.finish()
    check_wandb(run, num_keys_hidden=HIDDEN_OF_11)
    (artifact,) = records(run, "artifact")
    (entry,) = artifact["manifest"]["contents"]
    assert len(stored(Path(entry["local_path"]))) == 3


class Failing:
    """A logger that has no room for text."""

    def __init__(self):
        self.experiment, self.logged = self, 0

    def log_metrics(self, metrics, step):
        self.logged += 1

    def add_text(self, tag, text, step):
        raise OSError("disk full")


def test_a_logger_that_fails_at_an_alert_keeps_its_scalars(synthetic, series):
    logger = Failing()
    with pytest.warns(
        RepflowWarning, match="OSError: disk full, at an alert; it gets no more of them, while"
    ) as caught:
        write(LoggerSink([logger]), synthetic.make_run(), series)
    assert (len(caught), logger.logged) == (1, 6)
