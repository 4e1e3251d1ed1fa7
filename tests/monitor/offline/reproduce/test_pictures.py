"""Pictures: drawn from what is written alone, the same each time, and nowhere else than asked for."""

import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from typer.testing import CliRunner

from repflow.monitor.cli import app
from tests.monitor.offline.reproduce.conftest import reproduce
from tests.monitor.offline.reproduce.test_random_targets import FIGURES


def copied(folder: Path, target: Path, pattern: str = "*") -> Path:
    """Some of what is written, without the work behind it."""
    target.mkdir()
    for path in folder.glob(f"{pattern}.*"):
        shutil.copy(path, target)
    return target


@pytest.mark.parametrize("target", [*(f"figure{number}" for number in range(1, 8)), "table1", "table2"])
def test_every_target_has_its_pictures(target: str, page: Path):
    with Image.open(page.parent / f"{target}.png") as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors() or ()) > 20
    text = "".join(ElementTree.parse(page.parent / f"{target}.svg").getroot().itertext())
    words = ("gpt_neo (TBM)", "1-D policy: trivial") if target in FIGURES else ("gpt_neox", "mamba2")
    assert all(word in text for word in words)


@pytest.mark.parametrize("target", ["figure1", "figure5"])
def test_the_same_data_give_the_same_files(target: str, page: Path, tmp_path: Path):
    folder = copied(page.parent, tmp_path / "again", target)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for kind in ("png", "svg"):
        (folder / f"{target}.{kind}").unlink()
    assert f"{folder / target}.svg" in reproduce("draw", folder).replace("\n", "")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_pictures_matplotlib_is_not_imported(models: Path, tmp_path: Path):
    code = (
        "import sys; from repflow.monitor.cli import app; "
        f"app(['reproduce', 'figure5', '--init', '--model', {str(models / 'gpt_neo')!r}, '--length', '16', '--seeds', "
        f"'1', '--scheme', 'xavier', '--no-pictures', '-o', {str(tmp_path)!r}], standalone_mode=False); "
        "print('matplotlib' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert result.stdout.splitlines()[-1] == "False"
    assert (tmp_path / "figure5.json").exists()


def test_what_is_there_is_drawn_by_the_next_run(models: Path, tmp_path: Path):
    arguments = [*("figure3", "--init", "--model", models / "mamba2", "--length", "16", "--seeds", "1"),
                 *("--scheme", "kaiming", "--policy", "default", "-o", tmp_path)]  # fmt: skip
    reproduce(*arguments, "--no-pictures")
    output = reproduce(*arguments)
    assert "figure3: is there already" in output
    assert f"{tmp_path / 'figure3.svg'}" in output.replace("\n", "")


@pytest.mark.parametrize("damage", ["csv", "npz"])
def test_damaged_data_are_one_line(damage: str, checkpoints: Path, tmp_path: Path):
    folder = copied(checkpoints, tmp_path / "copy", "figure1")
    if damage == "csv":
        (folder / "figure1.csv").unlink()
    else:
        (folder / "figure1.npz").write_bytes(b"PK\x03\x04 cut short")
    result = CliRunner().invoke(app, ["reproduce", "draw", str(folder)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "expected figure1.csv and .npz beside figure1.json, whole" in line and line.endswith("--force")
