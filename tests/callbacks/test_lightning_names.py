"""Lightning under both of its import names: the Trainer, modules, callbacks and loggers of each, in one process."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset

from repflow.callbacks import RepresentationMonitor
from repflow.monitor import open_run
from repflow.monitor.sinks import RunFileSink
from tests.callbacks.watching import Keep, hooks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|fewer than the logging interval|exists and is not empty|isinstance.treespec)"
)
FRAMEWORKS = (lightning.pytorch, pytorch_lightning)


@pytest.fixture(params=FRAMEWORKS, ids=lambda framework: framework.__name__)
def framework(request: pytest.FixtureRequest, tmp_path, monkeypatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    return request.param


def model_of(framework: Any, fail_at: int | None = None) -> Any:
    """A model to train under `framework`. `fail_at`: number of the batch whose training step raises."""

    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            sizes: dict[str, Any] = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48)
            config = transformers.GPTNeoXConfig(vocab_size=64, num_hidden_layers=3, **sizes)
            self.model = transformers.GPTNeoXForCausalLM(config)

        def training_step(self, batch, index):
            loss = self.model(input_ids=batch[0], labels=batch[0]).loss
            if index == fail_at:
                raise ZeroDivisionError("in the user's training step")
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    return Model()


def fit(framework: Any, callbacks: Any, model: Any = None, ckpt_path: Any = None, epochs: int = 2) -> Any:
    """A Trainer of `framework` that has trained for six steps an epoch."""
    trainer = framework.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=framework.loggers.CSVLogger("logs"), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    ids = torch.randint(0, 64, (24, 10), generator=torch.Generator().manual_seed(1))
    trainer.fit(model or model_of(framework), DataLoader(TensorDataset(ids), 4), ckpt_path=ckpt_path)
    return trainer


def test_a_single_callback(framework) -> None:
    """Which a Trainer takes for one only if it is of its own kind."""
    trainer = fit(framework, RepresentationMonitor(every_n_steps=5))
    (path,) = Path("repflow-runs").glob("*.db")
    assert open_run(path).step.values.tolist() == [0, 5, 10]
    assert "repflow/inter_token/state_00" in trainer.callback_metrics
    (csv,) = Path("logs").rglob("metrics.csv")
    assert "repflow/v_loc" in csv.read_text().splitlines()[0]


def test_what_is_beside_it_sees_the_scalars_and_a_checkpoint_continues_the_run(framework) -> None:
    checkpoint = framework.callbacks.ModelCheckpoint("saved", monitor="repflow/v_loc", save_last=True)
    stopping = framework.callbacks.EarlyStopping("repflow/v_loc", patience=9)
    fit(framework, [RepresentationMonitor(every_n_steps=2), checkpoint, stopping], epochs=1)
    assert checkpoint.best_model_score is not None
    trainer = fit(framework, [RepresentationMonitor(every_n_steps=2)], ckpt_path="saved/last.ckpt")
    (path,) = Path("repflow-runs").glob("*.db")
    assert open_run(path).step.values.tolist() == list(range(0, 12, 2)) and trainer.global_step == 12


def test_an_exception(framework) -> None:
    model = model_of(framework, fail_at=3)
    with pytest.raises(ZeroDivisionError, match="in the user's training step"):
        fit(framework, [RepresentationMonitor(every_n_steps=1, sinks=[RunFileSink("run.db")])], model)
    assert sum(hooks(model)) == 0
    assert open_run("run.db").step.values.tolist() == [0, 1, 2]


def test_one_callback_under_both(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    keep = Keep()
    callback = RepresentationMonitor(every_n_steps=3, sinks=[keep])
    for framework in FRAMEWORKS:
        assert isinstance(callback, framework.Callback)
        fit(framework, [callback], epochs=1)
    assert keep.steps == [0, 3] * 2


WITHOUT_LIGHTNING = """
import sys
from repflow import _imports
_imports.LIGHTNING = False  # what it is where only pytorch_lightning is installed
sys.modules["lightning"] = None  # whose import raises then
from repflow.callbacks import RepresentationMonitor
from pytorch_lightning import Callback
assert issubclass(RepresentationMonitor, Callback)
"""


def test_without_lightning(tmp_path) -> None:
    paths = str(Path(__file__).parents[2] / "src")
    command = [sys.executable, "-c", WITHOUT_LIGHTNING]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, check=True, timeout=120)
