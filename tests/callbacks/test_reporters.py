"""What the Hugging Face Trainer reports to: read back from the files that W&B and TensorBoard write."""

import warnings
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from repflow.callbacks import RepresentationMonitorCallback
from repflow.monitor import RepflowWarning
from repflow.monitor.sinks import WandbSink
from tests.callbacks.test_transformers import losses, train
from tests.callbacks.watching import Keep
from tests.monitor.sinks.test_wandb_sink import Log


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RepflowWarning)
        yield
    if wandb.run is not None:
        wandb.finish()


def board(folder: Path) -> EventAccumulator:
    """Everything that one TensorBoard run holds."""
    (run,) = folder.glob("runs/*")
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_tensorboard(tmp_path) -> None:
    """In the Trainer's own run: every snapshot once, and the images; the last snapshot comes before the end."""
    keep = Keep()
    callback = RepresentationMonitorCallback(every_n_steps=1, sinks=[keep])
    trainer = train(tmp_path, callback, report_to="tensorboard", num_train_epochs=4)
    events = board(tmp_path)
    values = [(event.step, event.value) for event in events.Scalars("repflow/inter_token/state_02")]
    assert values == [(s.step, pytest.approx(float(s.inter_token[2]), rel=1e-6)) for s in keep.snapshots]
    assert len(values) == 24
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(trainer), rel=1e-6)
    assert {event.step for event in events.Images("repflow/cka")} >= {0, 23}


def test_tensorboard_again(tmp_path) -> None:
    """A Trainer that trains twice goes on in its run."""
    callback = RepresentationMonitorCallback(every_n_steps=6, sinks=[])
    trainer = train(tmp_path, callback, report_to="tensorboard")
    trainer.train()
    assert [event.step for event in board(tmp_path).Scalars("repflow/v_loc")] == [0, 6] * 2


def test_wandb(tmp_path) -> None:
    """In the Trainer's own run, which stays open: over our step, with its step as a field."""
    callback = RepresentationMonitorCallback(every_n_steps=5, sinks=[])
    trainer = train(tmp_path, callback, report_to="wandb", logging_steps=4)
    run = wandb.run
    assert run is not None
    trainer.evaluate()
    run.finish()
    log = Log(run)
    ours = [row for row in log.history if "repflow/v_loc" in row]
    assert [row["repflow/step"] for row in ours] == [0, 5, 10]
    assert [row["train/global_step"] for row in ours] == [0, 5, 10]
    assert [row["train/global_step"] for row in log.history if "train/loss" in row] == [4, 8, 12]
    assert not any("train/loss" in row for row in ours)  # one call each
    assert {step for key, step, _ in log.images if key == "repflow/cka"} == {0, 5, 10}
    assert log.history[-1]["eval/loss"] > 0  # the run was still open


def test_a_sink_of_the_users_own_is_not_doubled(tmp_path) -> None:
    run = wandb.init(project="try", dir=tmp_path)
    train(tmp_path, RepresentationMonitorCallback(every_n_steps=6, sinks=[WandbSink(heatmaps=False)]))
    run.finish()
    assert [row["repflow/step"] for row in Log(run).history if "repflow/v_loc" in row] == [0, 6]


def test_a_run_that_the_user_opened(tmp_path) -> None:
    """Though the Trainer itself reports to nobody."""
    run = wandb.init(project="try", dir=tmp_path)
    train(tmp_path, RepresentationMonitorCallback(every_n_steps=6, sinks=[], log_states=[0]))
    run.finish()
    rows = [row for row in Log(run).history if "repflow/v_loc" in row]
    assert [row["train/global_step"] for row in rows] == [0, 6]
    assert [key for key in rows[0] if key.startswith("repflow/inter_token/")] == ["repflow/inter_token/state_00"]
