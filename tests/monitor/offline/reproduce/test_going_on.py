"""What goes wrong with one target, or is there already, is no reason to do without the others, or to measure again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from repflow.monitor.cli import app
from repflow.monitor.offline.recorder import StateRecorder
from tests.monitor.offline.reproduce.conftest import reproduce, trained
from tests.monitor.offline.reproduce.test_checkpoints import result

FEW = ("--seeds", "1", "--scheme", "gaussian", "--policy", "scheme")


def partly(*arguments: str | Path) -> list[str]:
    """The lines that are said of what could not be done."""
    found = CliRunner().invoke(app, ["reproduce", *map(str, arguments)])
    assert found.exit_code == 2, found.output
    return [line for line in found.stderr.splitlines() if line.startswith("repflow: ")]


def made(folder: Path, kind: str = "json") -> set[str]:
    return {path.stem for path in folder.glob(f"*.{kind}")}


def test_a_window_too_small_for_some_targets(models: Path, tmp_path: Path):
    """Figures take 2K tokens, which this model is not made for; of the tables 300 are left."""
    data = ("--model", models / "gpt_neox", "--data", models / "questions.jsonl.gz", "--samples", "44")
    (line,) = partly("all", *data, *FEW, "-o", tmp_path)
    missing = ("figure1", "figure2", "figure4", "figure3", "figure5", "figure6", "figure7")
    assert line == f"repflow: {', '.join(missing)}: nothing could be measured; ask for a smaller --length"
    assert made(tmp_path) == made(tmp_path, "svg") == {"table1", "table2"}
    assert {row["length"] for row in result(tmp_path, "table2").rows} == {300}
    assert len(result(tmp_path, "table2").about["skipped"]) == 3


def test_memory_that_does_not_suffice_for_one_length(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measure = StateRecorder.measure

    def short_of_memory(self: StateRecorder, ids: torch.Tensor, *others: Any, **options: Any) -> Any:
        if ids.shape[1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(self, ids, *others, **options)

    monkeypatch.setattr(StateRecorder, "measure", short_of_memory)
    model = ("--init", "--model", models / "gpt_neox", "--samples", "2", "--no-pictures", "-o", tmp_path)
    assert partly("figure2", "table2", *model, "--length", "64", "--length", "128") == [
        "repflow: figure2, table2: gpt_neox, random_ids, 128 tokens: out of memory with a single sequence of 128 "
        "tokens; take a smaller dtype, several GPUs (--device-map auto), a smaller length, or leave CKA out"
    ]
    assert made(tmp_path) == set()  # what lacks something must not pass for what was asked for
    assert "prompts" not in reproduce("figure2", *model, "--length", "64")  # which was measured


def test_a_target_that_cannot_be_written(models: Path, tmp_path: Path):
    (tmp_path / "figure2.csv").mkdir()
    options = ("--init", "--model", models / "mamba2", "--samples", "2", "--length", "64", *FEW, "-o", tmp_path)
    (line,) = partly("figure1", "figure2", "figure3", *options)
    assert line.startswith("repflow: figure2: ") and "figure2.csv" in line
    assert made(tmp_path) == made(tmp_path, "png") == {"figure1", "figure3"}


def test_probes_and_statistics_share_what_is_measured(models: Path, tmp_path: Path):
    arguments = [*trained(models, "gpt_neo"), "--task", "kvpr", "--no-pictures", "-o", tmp_path]
    assert "44 prompts" in reproduce("table1", *arguments)
    assert "prompts" not in reproduce("table2", *arguments)  # what was kept for probes does for others
    assert result(tmp_path, "table2").about["models"]["gpt_neo/kvpr/300"]["features"] is True


def test_a_larger_sample_is_kept(models: Path, tmp_path: Path):
    arguments = ["--init", "--model", models / "mamba2", "--length", "32", "--no-pictures", "-o", tmp_path]
    assert "16 prompts" in reproduce("figure2", *arguments, "--samples", "16")
    assert "figure2: is there already" in reproduce("figure2", *arguments)  # 8 would be taken
    assert "prompts" not in reproduce("table2", *arguments)
    assert result(tmp_path, "table2").about["request"]["samples"] == [16]
    assert "4 prompts" in reproduce("figure2", *arguments, "--samples", "4")
    assert result(tmp_path, "figure2").about["request"]["samples"] == [4]
    again = reproduce("figure2", *arguments)
    assert "is there already" not in again and "prompts" not in again  # made from the 16
    assert "8 prompts" in reproduce("figure2", *arguments, "--force")
