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
from repflow.monitor.snapshot import BlockInfo, RunInfo, Snapshot
from repflow.monitor.sum_layout import SumLayout


def write_run(path: Path) -> None:
    """A run file with three snapshots."""
    layout = SumLayout(3)
    sink = RunFileSink(path)
    blocks = tuple(BlockInfo(index=index, name=f"blocks.{index}", kind="attention") for index in range(2))
    sink.start(RunInfo(name="run", stream="blocks", blocks=blocks, model_class="Model", parameters=1))
    for step in range(3):
        sums = torch.ones(layout.size, dtype=torch.float64)
        sink.write(Snapshot.from_sums(sums, num_states=3, step=step, stream="blocks", overhead_ms=1.0))
    sink.close()


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "report" in result.output
    assert "watch" in result.output
    assert "inspect" in result.output
    assert "tasks" in result.output


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
        (["demo", "--size", ""], "--size: expected one of small, medium, large, got ''"),
        (["report", "missing.db"], "missing.db: expected a run file"),
        (["report", "missing.db", "-o", "missing.db"], "--output: expected a page to write, and missing.db is one of"),
        (["report", "missing.db", "-o", "."], "--output: expected a file to write, and . is a folder"),
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


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["demo", "--text", ""], "--text"),
        (["demo", "--out", ""], "--out"),
        (["report", ""], "RUN"),
        (["report", "a.db", "-o", ""], "--output"),
    ],
)
def test_an_empty_path_is_not_the_working_directory(arguments: list[str], option: str):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert option in result.stderr
    assert "expected a path, got an empty text" in result.stderr


def test_every_file_that_is_no_run_file_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPFLOW_TRACEBACK", raising=False)
    Path("list.db").write_text("a shopping list")
    write_run(tmp_path / "run.db")
    result = CliRunner().invoke(app, ["report", "list.db", "run.db", "missing.db"])
    assert result.exit_code == 2
    head, first, second = result.stderr.splitlines()
    assert head.endswith("2 of 3 paths cannot be opened as run files; leave them out: the other 1 can be read")
    assert first.startswith("repflow:   list.db: expected a run file of repflow, found a file that is no SQLite")
    assert second.startswith("repflow:   missing.db: expected a run file, found nothing there")
    assert (first + second).count("list.db") == (first + second).count("missing.db") == 1
    assert not Path("report.html").exists()


@pytest.mark.parametrize("command", [["report"], ["demo"]])
def test_a_bug_is_not_shown_as_an_error_of_the_user(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def buggy(*_: object) -> None:
        raise ValueError("zip() argument 2 is shorter than argument 1")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPFLOW_TRACEBACK", raising=False)
    monkeypatch.setattr("repflow.monitor.report._page.render_page", buggy)
    monkeypatch.setattr("repflow.monitor.demo.run.run_demo", buggy)
    write_run(tmp_path / "run.db")
    result = CliRunner().invoke(app, [*command, "run.db"] if command == ["report"] else command)
    assert isinstance(result.exception, ValueError)
    assert result.stderr == ""


IN_A_POOR_TERMINAL = """
from pathlib import Path
from rich.console import Console
from repflow.monitor.cli import app
from repflow.monitor.demo.models import MODELS
from repflow.monitor.demo.summary import show_table
from repflow.monitor.demo.training import Outcome

app(["report", "run.db", "-o", "before–after.html"], standalone_mode=False)
outcome = Outcome(model=MODELS["small"][0], run_file=Path("run.db"), first_loss=5.5, last_loss=2.5)
show_table(Console(width=100), [outcome], [None])
app(["report", "missing–…→.db"])
"""


def test_a_terminal_that_lacks_characters_shows_the_rest(tmp_path: Path):
    write_run(tmp_path / "run.db")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", IN_A_POOR_TERMINAL]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert result.returncode == 2, result.stderr
    assert b"5.50 ? 2.50" in result.stdout
    assert result.stderr.startswith(b"repflow: missing")
    assert (tmp_path / "before–after.html").exists()


def test_report_draws_a_baseline(tmp_path: Path):
    write_run(tmp_path / "run.db")
    page, run = tmp_path / "page.html", str(tmp_path / "run.db")
    assert CliRunner().invoke(app, ["report", run, "--baseline", run, "-o", str(page)]).exit_code == 0
    assert "run (run.db) #2 (baseline)" in page.read_text()


def test_report_writes_a_page(tmp_path: Path):
    write_run(tmp_path / "run.db")
    page = tmp_path / "pages" / "page.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run.db"), "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(page)
    assert "<html" in page.read_text()[:200].lower()
