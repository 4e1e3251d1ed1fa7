"""Models and tokenizers of one name that are not the same: files of a folder that changed, revisions of the hub."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.monitor.offline import tiny
from tests.monitor.offline.reproduce.conftest import reproduce
from tests.monitor.offline.reproduce.test_checkpoints import result

NAME = "tiny/pythia"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub's client keeps of a model: two commits, the later one `main`, the first also called `step1`."""
    folder = tmp_path / "hub" / "models--tiny--pythia"
    for seed, commit in enumerate(("1" * 40, "2" * 40)):
        tiny.save(folder / "snapshots" / commit, "gpt_neox", seed=seed)
    (folder / "refs").mkdir()
    (folder / "refs" / "step1").write_text("1" * 40)
    (folder / "refs" / "main").write_text("2" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def arguments(model: str | Path, folder: Path) -> list[str | Path]:
    few = ("--task", "kvpr", "--length", "300", "--samples", "4", "--no-pictures")
    return ["figure2", "--model", model, *few, "-o", folder / "out"]


def values(folder: Path) -> list[float]:
    return [row["value"] for row in result(folder / "out", "figure2").rows]


def test_a_revision_is_a_model_of_its_own(hub: Path, tmp_path: Path):
    reproduce(*arguments(NAME, tmp_path))
    main = values(tmp_path)
    reproduce(*arguments(NAME, tmp_path), "--revision", "step1")
    assert values(tmp_path) != main
    assert {row["model"] for row in result(tmp_path / "out", "figure2").rows} == {"tiny/pythia@step1"}
    (stated,) = result(tmp_path / "out", "figure2").about["models"].values()
    assert stated["revision"] == "1" * 40
    (hub / "refs" / "main").write_text("1" * 40)  # the name stands for another commit now
    step = values(tmp_path)
    assert "4 prompts" in reproduce(*arguments(NAME, tmp_path))
    assert values(tmp_path) == step
    assert "is there already" in reproduce(*arguments(NAME, tmp_path))


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_tokenizer_that_changed_is_another_one(place: str, hub: Path, models: Path, tmp_path: Path):
    name = NAME
    if place == "folder":
        name = str(shutil.copytree(models / "gpt_neox", tmp_path / "tokens"))
    given = [*arguments(models / "mamba2", tmp_path), "--tokenizer", name]
    reproduce(*given)
    before = values(tmp_path)
    assert "is there already" in reproduce(*given)
    if place == "folder":
        tiny.with_ends().save_pretrained(name)
    else:
        (hub / "refs" / "main").write_text("1" * 40)
        tiny.with_ends().save_pretrained(hub / "snapshots" / ("1" * 40))
    assert "4 prompts" in reproduce(*given)
    assert values(tmp_path) != before


def test_a_configuration_that_changed_is_another_one(models: Path, tmp_path: Path):
    tiny.config("gpt_neo").save_pretrained(tmp_path / "model")
    drawn = ("figure3", "--init", "--model", tmp_path / "model", "--length", "16", "--seeds", "1", "--scheme", "xavier")
    given = [*drawn, "--policy", "scheme", "--no-pictures", "-o", tmp_path]
    reproduce(*given)
    assert "is there already" in reproduce(*given)
    tiny.config("gpt_neo", num_layers=2, attention_types=[[["global"], 2]]).save_pretrained(tmp_path / "model")
    assert "1 streams" in reproduce(*given)
    assert len(result(tmp_path, "figure3").rows) == 3


def test_prompts_of_another_seed(models: Path, tmp_path: Path):
    seen: list[list[float]] = []
    for seed in ("0", "1", "0"):
        reproduce(*arguments(models / "gpt_neox", tmp_path), "--prompt-seed", seed)
        seen.append(values(tmp_path))
        assert result(tmp_path / "out", "figure2").about["models"]["gpt_neox/kvpr/300"]["seed"] == int(seed)
    assert seen[0] == seen[2] != seen[1]
    random = ("table2", "--init", "--model", models / "mamba2", "--length", "16", "--no-pictures", "-o", tmp_path)
    reproduce(*random)
    zero = (tmp_path / "table2.csv").read_text()
    reproduce(*random, "--prompt-seed", "1")
    assert (tmp_path / "table2.csv").read_text() != zero


def test_tested_positions(models: Path, tmp_path: Path):
    reproduce(*arguments(models / "gpt_neox", tmp_path), "--classes", "3")
    assert len(result(tmp_path / "out", "figure2").about["models"]["gpt_neox/kvpr/300"]["positions"]) == 3
