"""What the tests of `repflow reproduce` share: small checkpoints, and the command that is really called."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from repflow.monitor.cli import app
from tests.monitor.offline import questions, tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each kind, and questions."""
    folder = tmp_path_factory.mktemp("models")
    for kind in tiny.KINDS:
        tiny.save(folder / kind, kind)
    questions.write(folder / "questions.jsonl.gz")
    return folder


def reproduce(*arguments: str | Path) -> str:
    """What `repflow reproduce` prints, which must do what it is asked for."""
    result = CliRunner().invoke(app, ["reproduce", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def trained(models: Path, *kinds: str) -> list[str | Path]:
    """Arguments for checkpoints on short prompts."""
    named = [argument for kind in kinds for argument in ("--model", models / kind)]
    return [*named, "--data", models / "questions.jsonl.gz", "--length", "300", "--samples", "44", "--seeds", "2"]


@pytest.fixture(scope="session")
def drawn(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The figures of models drawn at random: the folder they are in."""
    folder = tmp_path_factory.mktemp("drawn")
    named = [argument for kind in tiny.KINDS for argument in ("--model", models / kind)]
    reproduce(
        *("figure3", "figure5", "figure6", "figure7", "--init", *named, "--length", "64", "--seeds", "2"),
        *("--scheme", "gaussian", "--scheme", "default", "--no-pictures", "-o", folder),
    )
    return folder


@pytest.fixture(scope="session")
def checkpoints(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All targets on two checkpoints: the folder they are in."""
    folder = tmp_path_factory.mktemp("checkpoints")
    few = ("--scheme", "gaussian", "--policy", "scheme")
    reproduce("all", *trained(models, "gpt_neox", "mamba2"), *few, "--no-pictures", "-o", folder)
    return folder


@pytest.fixture(scope="session")
def page(drawn: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All targets as pictures and on one page, from data alone, as they come from another machine."""
    folder = tmp_path_factory.mktemp("page")
    for source in (checkpoints, drawn):
        assert not [*source.glob("*.png"), *source.glob("*.svg")]  # --no-pictures
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("work"), dirs_exist_ok=True)
    assert reproduce("report", folder).replace("\n", "") == str(folder / "report.html")
    return folder / "report.html"
