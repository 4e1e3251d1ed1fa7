"""The W&B workspace: its specification is kept in dashboard.json; `python -m repflow dashboard` prints it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from typer.testing import CliRunner

from repflow.monitor.cli import app
from repflow.monitor.sinks import dashboard
from repflow.monitor.sinks._keys import scalar_items
from repflow.monitor.sum_layout import SumLayout

KEPT = Path(__file__).with_name("dashboard.json")


def dashboard_command(*arguments: str):
    return CliRunner().invoke(app, ["dashboard", *arguments])


def panels(spec: dict) -> dict[str, list[dict]]:
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def test_the_specification_is_the_kept_one():
    result = dashboard_command("--project", "try", "--entity", "team")
    assert result.exit_code == 0
    assert json.loads(result.output) == json.loads(KEPT.read_text()), (
        "if that is meant: repflow dashboard --project try --entity team > tests/monitor/sinks/dashboard.json"
    )


def test_every_panel_shows_something_that_is_logged_and_every_scalar_is_shown(synthetic):
    layout = SumLayout(4, ssm_blocks=(0,), probe=True)
    kind = {"ssm_blocks": layout.ssm_blocks, "probe": layout.probe}
    snapshot = synthetic.make_snapshot(0, 4, sums=torch.ones(layout.size, dtype=torch.float64), **kind)
    snapshot.signatures["nonfinite"] = True
    logged, shown = set(scalar_items(snapshot)), set()
    spec = json.loads(dashboard.dashboard_spec(dashboard.build_dashboard("try")))
    assert list(panels(spec)) == ["overview", "depth", "CKA", "alerts"]
    for panel in [panel for section in panels(spec).values() for panel in section]:
        config = panel["config"]
        if panel["viewType"] == "Run History Line Plot":
            assert config["xAxis"] == "repflow/step"
            pattern = config.get("metricRegex")
            keys = {key for key in logged if re.search(pattern, key)} if pattern else set(config["metrics"])
            assert keys
            shown |= keys
        elif panel["viewType"] == "Media Browser":
            assert set(config["mediaKeys"]) <= {"repflow/cka", "repflow/inter_token"}
    assert shown == logged


def test_saving_without_a_login_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    result = dashboard_command("--save", "--entity", "team", "--project", "try")
    assert result.exit_code == 2
    assert "could not save the workspace to W&B" in result.output
    assert "log in with `wandb login`, and check that team/try is a project" in " ".join(result.output.split())


def test_saving_needs_an_entity():
    result = dashboard_command("--save")
    assert result.exit_code == 2
    assert "expected the user or team that the project" in result.output


WITHOUT = """
import importlib.metadata as metadata
found = metadata.version
def version(name):
    if name.replace("_", "-") == "wandb-workspaces":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import sys
sys.modules["wandb_workspaces"] = None
from repflow.monitor.cli import app
app(["dashboard"])
"""


def test_without_the_package_the_error_names_the_extra():
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert result.returncode == 2
    assert "repflow needs wandb-workspaces>=0.4.13 for this" in result.stderr
    assert "pip install 'repflow[wandb]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_ids_are_the_same_every_time():
    first, second = (dashboard.dashboard_spec(dashboard.build_dashboard("try")) for _ in range(2))
    assert first == second
