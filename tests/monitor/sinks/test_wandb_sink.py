import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from repflow.monitor import RepflowWarning
from repflow.monitor.sinks import FanOutSink, RunFileSink, WandbSink, open_run
from repflow.monitor.sinks._keys import scalar_items
from repflow.monitor.sinks._wandb_login import has_login


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    yield
    if wandb.run is not None:
        wandb.finish()


class Log:
    """What a finished offline run recorded, read back from its file."""

    def __init__(self, run):
        self.folder = Path(run.dir).parent
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(self.folder)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        records = [json.loads(line) for line in text.splitlines()]
        self.records = records
        self.history = [record["history"]["item"] for record in records if record["type"] == "history"]
        self.metrics = [record["metric"] for record in records if record["type"] == "metric"]
        self.summary = {}
        for record in records:
            if record["type"] == "summary":
                self.summary |= record["summary"].get("update", {})

    @property
    def images(self):
        """Every logged image: (key, step shown, path)."""
        return [
            (key, row["repflow/heatmap_step"], self.folder / "files" / row[f"{key}.path"])
            for row in self.history
            for key in ("repflow/cka", "repflow/inter_token")
            if f"{key}.path" in row
        ]


def test_a_run_of_its_own_is_read_back(tmp_path, synthetic):
    sink = WandbSink(project="try", dir=tmp_path)
    sink.start(synthetic.make_run(name="org/model"))
    run = wandb.run
    assert run is not None
    for step in range(0, 50, 10):
        sink.write(synthetic.make_snapshot(step))
    sink.close()
    sink.close()
    assert wandb.run is None  # finished
    log = Log(run)
    rows = [row for row in log.history if "repflow/step" in row and "repflow/v_loc" in row]
    assert [row["repflow/step"] for row in rows] == [0, 10, 20, 30, 40]
    for row in rows:
        expected = scalar_items(synthetic.make_snapshot(row["repflow/step"]))
        assert {key: row[key] for key in expected} == expected
    assert {(key, step) for key, step, _ in log.images} == {
        (key, step) for key in ("repflow/cka", "repflow/inter_token") for step in range(0, 50, 10)
    }
    for _, _, path in log.images:
        assert Image.open(path).size[1] == 510  # 6 states of 85 pixels
    assert log.summary["repflow/inter_token/state_05"] == float(synthetic.make_snapshot(40).inter_token[5])
    (run_record,) = [record["run"] for record in log.records if record["type"] == "run"]
    assert (run_record["project"], run_record["display_name"]) == ("try", "org/model")


def test_an_image_shows_the_matrix(tmp_path, synthetic):
    run = wandb.init(project="try", dir=tmp_path)
    sink = WandbSink(run)
    sink.start(synthetic.make_run())
    sink.write(synthetic.make_snapshot(7))
    sink.close()
    run.finish()
    ((_, step, path),) = [image for image in Log(run).images if image[0] == "repflow/cka"]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert step == 7
    cka = synthetic.make_snapshot(7).cka.numpy()
    order = np.argsort(cka.ravel())
    light = (pixels[::-1][42::85, 42::85] @ [0.2126, 0.7152, 0.0722]).ravel()
    assert np.all(np.diff(light[order]) >= 0)
    assert tuple(pixels[-1, 0]) == (0xFD, 0xE7, 0x25)  # CKA of state 0 with itself is 1


def test_the_users_run_keeps_its_step_its_metrics_and_its_life(tmp_path, synthetic):
    run = wandb.init(project="try", dir=tmp_path)
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)  # as Lightning's logger does
    sink = WandbSink(states=[0, -1], heatmaps=False)
    sink.start(synthetic.make_run())
    for step in range(3):
        run.log({"loss": 1.0 - step, "trainer/global_step": step})
        sink.write(synthetic.make_snapshot(step))
    sink.close()
    assert wandb.run is run
    run.log({"loss": -9.0, "trainer/global_step": 9})
    run.finish()
    log = Log(run)
    assert [row["_step"] for row in log.history] == list(range(7))  # nothing dropped, one call each
    assert [row["loss"] for row in log.history if "loss" in row] == [1.0, 0.0, -1.0, -9.0]
    ours = [row for row in log.history if "repflow/step" in row]
    assert [row["repflow/step"] for row in ours] == [0, 1, 2]
    assert not any("trainer/global_step" in row for row in ours)  # our metrics are over our step alone
    assert [key for key in ours[0] if "/inter_token/" in key and "update" not in key] == [
        "repflow/inter_token/state_00",
        "repflow/inter_token/state_05",
    ]
    names = [metric.get("name", metric.get("glob_name")) for metric in log.metrics]
    assert all(name.startswith("repflow/") for name in names[2:])
    assert not log.images


def test_images_are_thinned_out(tmp_path, synthetic):
    sink = WandbSink(max_images=12, dir=tmp_path)
    sink.start(synthetic.make_run())
    run = wandb.run
    for step in range(30):
        sink.write(synthetic.make_snapshot(step))
    sink.close()
    images = Log(run).images
    assert sorted(step for key, step, _ in images if key == "repflow/cka") == [0, 2, 6, 14, 29]
    assert len(images) == 10


def test_the_run_file_is_saved_while_it_is_still_open(tmp_path, synthetic):
    run_file = RunFileSink(tmp_path / "a.db")
    sink = WandbSink(heatmaps=False, run_file=run_file, dir=tmp_path)
    for each in (run_file, sink):
        each.start(synthetic.make_run())
    run = wandb.run
    for step in range(5):
        for each in (run_file, sink):
            each.write(synthetic.make_snapshot(step))
    run_file.flush()
    sink.close()
    run_file.close()
    (artifact,) = [record["artifact"] for record in Log(run).records if record["type"] == "artifact"]
    assert artifact["type"] == "repflow-run"
    (entry,) = artifact["manifest"]["contents"]
    assert entry["path"] == "a.db"
    assert open_run(entry["local_path"]).sizes["step"] == 5


def test_calls_out_of_order(synthetic):
    sink = WandbSink()
    sink.close()
    with pytest.raises(RuntimeError, match="start"):
        sink.write(synthetic.make_snapshot(0))
    with pytest.raises(ValueError, match="max_images="):
        WandbSink(max_images=1)


def test_an_argument_that_wandb_does_not_know_is_refused_at_once():
    with pytest.raises(TypeError, match=r"got projct; those of `wandb.init` are .*project"):
        WandbSink(projct="try")


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("run", ["try", wandb], ids=["a name", "the package"])
def test_what_is_no_run_is_refused_at_once(run):
    with pytest.raises(TypeError, match=r'expected run as what `wandb.init` returned, got .*WandbSink\(project="'):
        WandbSink(run)


def test_a_run_that_the_user_finished_is_one_warning(tmp_path, synthetic):
    run = wandb.init(project="try", dir=tmp_path)
    fan = FanOutSink([WandbSink(run)])
    fan.start(synthetic.make_run())
    fan.write(synthetic.make_snapshot(0))
    run.finish()
    with pytest.warns(
        RepflowWarning, match=r"expected the W&B run to be open.*call `wandb.finish\(\)` after"
    ) as caught:
        for step in range(1, 4):
            fan.write(synthetic.make_snapshot(step))
        fan.close()
    assert len(caught) == 1


def test_closing_after_the_user_finished_the_run_says_what_is_lost(tmp_path, synthetic):
    run = wandb.init(project="try", dir=tmp_path)
    sink = WandbSink(run)
    sink.start(synthetic.make_run())
    sink.write(synthetic.make_snapshot(0))
    run.finish()
    with pytest.warns(RepflowWarning, match="the last images, the summary and the artifact did not reach W&B"):
        sink.close()


UNATTENDED = """
import os, sys
sys.stdin = open(os.devnull)  # nobody is there to be asked
import wandb
from synthetic import make_run
from repflow.monitor.sinks import WandbSink
sink = WandbSink(project="try", heatmaps=False, settings={settings})
sink.start(make_run())
print("offline" if wandb.run.offline else "online", wandb.run.disabled)
sink.close()
"""


@pytest.mark.parametrize(("settings", "printed"), [("None", "offline False"), ("{'mode': 'disabled'}", "True")])
def test_a_user_without_login_is_not_asked_for_one(tmp_path, run_script, monkeypatch, settings, printed):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    assert printed in run_script(UNATTENDED.replace("{settings}", settings))


def test_a_login_is_found_in_the_netrc_file(tmp_path, monkeypatch):
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    public, own = "https://api.wandb.ai", "https://wandb.example:8080"
    assert not has_login(public)
    (tmp_path / "_netrc").write_text("machine api.wandb.ai login user password key")
    assert has_login(public) and has_login("https://api.forge.coreweave.com") and not has_login(own)
    (tmp_path / ".netrc").write_text("machine wandb.example:8080 login user password key")
    assert has_login(own) and not has_login(public)
    (tmp_path / "broken").write_text("machine")
    monkeypatch.setenv("NETRC", str(tmp_path / "broken"))
    assert not has_login(own)
