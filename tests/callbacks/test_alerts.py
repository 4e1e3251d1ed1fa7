"""Alerts through the Lightning callback: into callback_metrics and the run file, once, also over a resume."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from repflow.callbacks import RepresentationMonitor
from repflow.monitor import AlertWarning, open_run
from repflow.monitor.signatures import DeadBlocks, NonFinite
from tests.callbacks.test_lightning import Model, fit

RULES = (NonFinite(), DeadBlocks(warmup_steps=0, patience=2))


class DeadAtTheEnd(Model):
    """The last block adds nothing, from the first step on."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        last = self.model.get_submodule("gpt_neox.layers.2")
        for name in ("attention.dense", "mlp.dense_4h_to_h"):
            for parameter in last.get_submodule(name).parameters():
                parameter.data.zero_()
                parameter.requires_grad_(False)


def run_alerts(folder: Path) -> list[dict]:
    (path,) = (folder / "repflow-runs").glob("*.db")
    return json.loads(open_run(path).attrs["alerts"])


def test_a_checkpoint_keeps_what_was_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    first = RepresentationMonitor(every_n_steps=2, signatures=RULES)
    with pytest.warns(AlertWarning, match=r"at step 2: A block does nothing.*'model.gpt_neox.layers.2' \(attention\)"):
        _, trainer = fit(tmp_path, first, checkpoint, model=DeadAtTheEnd(), max_epochs=1)
    assert float(trainer.callback_metrics["repflow/alerts/dead_blocks"]) == 1
    assert float(trainer.callback_metrics["repflow/alerts/nonfinite"]) == 0
    (alert,) = run_alerts(tmp_path)
    assert (alert["step"], alert["states"], alert["signature"]) == (2, [3], "dead_blocks")

    resumed = RepresentationMonitor(every_n_steps=2, signatures=RULES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AlertWarning)
        _, trainer = fit(
            tmp_path, resumed, model=DeadAtTheEnd(), max_epochs=3, ckpt_path=tmp_path / "ckpt" / "last.ckpt"
        )
    assert run_alerts(tmp_path) == [alert]
    assert float(trainer.callback_metrics["repflow/alerts/dead_blocks"]) == 1


def test_a_checkpoint_of_before_there_were_alerts_is_resumed(tmp_path):
    callback = RepresentationMonitor(every_n_steps=2, sinks=[])
    callback.load_state_dict({"name": "an old run"})
    fit(tmp_path, callback, max_epochs=1)
    assert callback.monitor is not None and callback.monitor.run.name == "an old run"


def test_early_stopping_ends_a_run_whose_values_are_not_finite(tmp_path):
    class Breaks(Model):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 3:
                with torch.no_grad():
                    next(self.model.get_submodule("gpt_neox.layers.1").parameters()).fill_(torch.nan)

    stop = EarlyStopping("repflow/alerts/nonfinite", stopping_threshold=2, divergence_threshold=0.5, patience=99)
    monitor = RepresentationMonitor(every_n_steps=1, sinks=[])
    with pytest.warns(AlertWarning, match="at step 3: Values are not finite"):
        _, trainer = fit(tmp_path, monitor, stop, model=Breaks(), max_epochs=3)
    assert trainer.global_step == 6  # the end of the first of three epochs
