import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from repflow.monitor import RepflowWarning
from repflow.monitor.sinks import LoggerSink
from repflow.monitor.sinks._keys import scalar_items


def write(sink, synthetic, steps):
    sink.start(synthetic.make_run())
    for step in steps:
        sink.write(synthetic.make_snapshot(step))
    sink.close()


def test_csv_logger_gets_scalars_under_the_measured_step(tmp_path, synthetic):
    logger = CSVLogger(tmp_path, name="try")
    write(LoggerSink([logger]), synthetic, [0, 50, 100])
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 50, 100]
    expected = scalar_items(synthetic.make_snapshot(50))
    assert {key: float(rows[1][key]) for key in expected} == expected


def test_tensorboard_logger_gets_scalars_and_images(tmp_path, synthetic):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="try")
    write(LoggerSink(lambda: [logger], max_images=4), synthetic, range(0, 500, 50))
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0}).Reload()
    scalars = events.Scalars("repflow/inter_token/state_03")
    assert [event.step for event in scalars] == list(range(0, 500, 50))
    expected = [float(synthetic.make_snapshot(event.step).inter_token[3]) for event in scalars]
    np.testing.assert_allclose([event.value for event in scalars], expected, rtol=1e-6)
    for key in ("repflow/cka", "repflow/inter_token"):
        # 4 images are 2 of each, one of which is kept for the end
        assert [(image.step, image.height) for image in events.Images(key)] == [(0, 510), (450, 510)]


def test_wandb_logger_gets_scalars_and_images(tmp_path, synthetic, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    logger = WandbLogger(project="try", save_dir=tmp_path, offline=True)
    write(LoggerSink([logger]), synthetic, [0, 50])
    run = logger.experiment
    run.finish()
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(Path(run.dir).parent)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [record["history"]["item"] for record in map(json.loads, text.splitlines()) if record["type"] == "history"]
    scalars = [row for row in rows if "repflow/v_loc" in row]
    assert [row["trainer/global_step"] for row in scalars] == [0, 50]
    assert scalars[1]["repflow/v_loc"] == float(synthetic.make_snapshot(50).v_loc)
    for key in ("repflow/cka", "repflow/inter_token"):
        images = [row for row in rows if f"{key}.filenames" in row]
        assert [row["trainer/global_step"] for row in images] == [0, 50]
        assert images[0][f"{key}.height"] == 510


class Plain:
    """The least that a logger can be."""

    group_separator = "."

    def __init__(self):
        self.logged = []

    def log_metrics(self, metrics, step):
        self.logged.append((step, metrics))


def test_any_logger_will_do(synthetic):
    plain = Plain()
    write(LoggerSink((plain,), states=[1]), synthetic, [4])
    ((step, metrics),) = plain.logged
    assert step == 4
    assert metrics == scalar_items(synthetic.make_snapshot(4), [1], separator=".")


def test_loggers_are_asked_for_at_every_snapshot(synthetic):
    loggers = [Plain()]
    sink = LoggerSink(lambda: loggers, heatmaps=False)
    sink.start(synthetic.make_run())
    sink.write(synthetic.make_snapshot(0))
    loggers.append(Plain())
    sink.write(synthetic.make_snapshot(1))
    assert [len(logger.logged) for logger in loggers] == [2, 1]


def test_no_lightning_is_imported():
    code = "import sys, repflow.monitor.sinks as s; assert not {'lightning', 'wandb', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_too_few_images():
    with pytest.raises(ValueError, match="max_images="):
        LoggerSink([], max_images=0)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("loggers", [Plain(), "csv", [3]], ids=["one alone", "a name", "no logger"])
def test_something_that_is_no_list_of_loggers(loggers) -> None:
    with pytest.raises(TypeError, match=r"expected a list of loggers with a method log_metrics.*write LoggerSink\(\["):
        LoggerSink(loggers)


class Failing(Plain):
    """Fails at every call of one of its methods."""

    def __init__(self, method):
        super().__init__()
        self.method, self.images = method, 0

    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step)
        if self.method == "log_metrics":
            raise OSError("disk full")

    def log_image(self, key, images, step, caption):
        self.images += 1
        if self.method == "log_image":
            raise OSError("no room for images")


def test_a_logger_that_fails_is_dropped_and_the_others_go_on(synthetic):
    bad, good = Failing("log_metrics"), Failing(None)
    with pytest.warns(RepflowWarning, match=r"Failing failed with OSError: disk full; it gets nothing more") as caught:
        write(LoggerSink([bad, good]), synthetic, range(3))
    assert len(caught) == 1
    assert (len(bad.logged), bad.images) == (1, 0)
    assert (len(good.logged), good.images) == (3, 6)


def test_a_logger_that_fails_at_images_keeps_its_scalars(synthetic):
    bad, good = Failing("log_image"), Failing(None)
    with pytest.warns(RepflowWarning, match="OSError: no room for images, at an image; it gets no more") as caught:
        write(LoggerSink([bad, good]), synthetic, range(3))
    assert len(caught) == 1
    assert (len(bad.logged), bad.images) == (3, 1)
    assert (len(good.logged), good.images) == (3, 6)


def test_without_pillow_there_are_scalars_only(tmp_path, synthetic, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(sys.modules, "PIL", None)  # as if it were not installed
    logger = TensorBoardLogger(tmp_path, name="try")
    with pytest.warns(RepflowWarning, match="TensorBoardLogger failed with .*Error.*PIL"):
        write(LoggerSink([logger]), synthetic, range(3))
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("repflow/v_loc")] == [0, 1, 2]
    assert events.Tags()["images"] == []


def test_a_new_run_tries_every_logger_again(synthetic):
    sink = LoggerSink([bad := Failing("log_metrics")])
    for _ in range(2):
        with pytest.warns(RepflowWarning):
            write(sink, synthetic, range(3))
    assert len(bad.logged) == 2
