import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import repflow
from repflow.monitor.cli import app
from repflow.monitor.sinks import RunFileSink
from repflow.monitor.snapshot import BlockInfo, RunInfo, Snapshot, SumLayout


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "report" in result.output


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, f"repflow {repflow.__version__}")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from repflow.monitor.cli import app; app(['demo', '--help'], standalone_mode=False); "
        "heavy = {'torch', 'lightning', 'transformers', 'wandb', 'plotly', 'xarray'}; print(heavy & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "--quick" in result.stdout
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--every", "0"], "--every: expected 1"),
        (["demo", "--steps", "0"], "--steps: expected 1"),
        (["demo", "--model", "rnn"], "--model: expected one of transformer, ssm, hybrid, got 'rnn'"),
        (["demo", "--size", "huge"], "--size: expected one of small, medium, large, got 'huge'"),
        (["demo", "--size", "small", "--text", "missing"], "--text: no such file or folder: missing"),
        (["report", "missing.db"], "missing.db"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPFLOW_TRACEBACK", raising=False)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("repflow: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REPFLOW_TRACEBACK", "1")
    result = CliRunner().invoke(app, ["demo", "--every", "0"])
    assert isinstance(result.exception, ValueError)
    assert "--every" in str(result.exception)


def test_report_writes_a_page(tmp_path: Path):
    layout = SumLayout(3)
    sink = RunFileSink(tmp_path / "run.db")
    blocks = tuple(BlockInfo(index=index, name=f"blocks.{index}", kind="attention") for index in range(2))
    sink.start(RunInfo(name="run", stream="blocks", blocks=blocks, model_class="Model", parameters=1))
    for step in range(3):
        sums = torch.ones(layout.size, dtype=torch.float64)
        sink.write(Snapshot.from_sums(sums, num_states=3, step=step, stream="blocks", overhead_ms=1.0))
    sink.close()

    page = tmp_path / "pages" / "page.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run.db"), "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(page)
    assert "<html" in page.read_text()[:200].lower()
