"""Of a folder in which something is damaged the rest is drawn, and what was left out is named."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.reproduce.written import read_result
from tests.monitor.offline.reproduce.conftest import reproduce
from tests.monitor.offline.reproduce.test_going_on import made, partly


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path) -> Path:
    """Two figures and two tables, without the work behind them."""
    for name in ("figure1", "figure2", "table1", "table2"):
        for path in checkpoints.glob(f"{name}.*"):
            shutil.copy(path, tmp_path)
    return tmp_path


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def rot(path: Path) -> None:
    """Some bytes of the first compressed array are others."""
    with zipfile.ZipFile(path) as packed:
        first = packed.infolist()[0]
    content = bytearray(path.read_bytes())
    start = first.header_offset + 30 + len(first.filename) + first.compress_size // 2
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)


def in_other_words(path: Path) -> None:
    path.write_text("step,loss\n1,2.5\n")


def without_rows(path: Path) -> None:
    path.write_text(path.read_text().splitlines()[0] + "\n")


def words_for_numbers(path: Path) -> None:
    head, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, first.rpartition(",")[0] + ",high", *rest]))


def other_arrays(path: Path) -> None:
    np.savez(path, loss=np.ones(3))


def without_a_key(path: Path) -> None:
    told = json.loads(path.read_text())
    del told["comparison"]
    path.write_text(json.dumps(told))


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("figure2.json", cut_short, "figure2.json is damaged (JSONDecodeError)"),
    ("figure2.json", lambda path: path.write_text("[]"), "figure2.json has no object"),
    ("table2.json", without_a_key, "table2.json has no 'comparison'"),
    ("figure1.csv", Path.unlink, "No such file"),
    ("figure2.csv", in_other_words, "figure2.csv has no column 'model'"),
    ("table1.csv", in_other_words, "table1.csv has no column 'model'"),
    ("table2.csv", lambda path: path.write_bytes(b""), "table2.csv has no column 'model'"),
    ("figure2.csv", without_rows, "figure2.csv has no rows"),
    ("figure2.csv", words_for_numbers, "figure2.csv has no number in column 'value' of row 1"),
    ("table2.csv", cut_short, "table2.csv has a row of another width: number "),
    ("figure1.npz", lambda path: path.write_bytes(b"PK\x03\x04 cut short"), "File is not a zip file"),
    ("figure1.npz", rot, "rror"),
    ("figure1.npz", Path.unlink, "No such file"),
    ("figure1.npz", other_arrays, "figure1.npz has no matrix '"),
    ("table1.npz", other_arrays, "table1.npz has no matrix '"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES, ids=[f"{name} {said}" for name, _, said in DAMAGES])
def test_what_is_damaged_is_told(name: str, damage: Callable[[Path], object], said: str, folder: Path):
    target = name.partition(".")[0]
    assert read_result(folder, target) is not None
    damage(folder / name)
    with pytest.raises(OfflineError) as caught:
        read_result(folder, target)
    beside = f"{target}.csv{' and .npz' if target in ('figure1', 'table1') else ''} beside {target}.json, whole; "
    assert str(caught.value).startswith(f"{folder}: expected {beside}")
    assert said in str(caught.value) and str(caught.value).endswith(". Make the target again with --force")


def test_the_rest_is_drawn(folder: Path):
    (folder / "figure1.npz").write_bytes(b"PK\x03\x04 cut short")
    in_other_words(folder / "figure2.csv")
    cut_short(folder / "table1.json")
    lines = partly("draw", folder)
    assert [line.partition(": expected ")[0] for line in lines] == [
        f"repflow: {target}: {folder}" for target in ("figure1", "figure2", "table1")
    ]
    assert made(folder, "svg") == made(folder, "png") == {"table2"}


def test_the_page_has_the_rest(folder: Path):
    cut_short(folder / "figure2.json")
    in_other_words(folder / "table2.csv")
    first, second = partly("report", folder)
    assert first.startswith("repflow: figure2: ") and second.startswith("repflow: table2: ")
    page = (folder / "report.html").read_text()
    assert [name for name in ("figure1", "figure2", "table1", "table2") if f'id="{name}"' in page] == [
        "figure1",
        "table1",
    ]


def test_without_anything_whole_there_is_no_page(folder: Path):
    for path in folder.glob("*.json"):
        cut_short(path)
    assert len(partly("report", folder)) == 4
    assert not (folder / "report.html").exists()


def test_a_run_makes_a_damaged_target_again(models: Path, tmp_path: Path):
    arguments = ("figure2", "--init", "--model", models / "mamba2", "--length", "32", "--no-pictures", "-o", tmp_path)
    reproduce(*arguments)
    whole = (tmp_path / "figure2.json").read_bytes()
    (tmp_path / "figure2.json").write_bytes(whole[:-40])
    with pytest.warns(RuntimeWarning, match=r"figure2\.json is damaged \(JSONDecodeError\); it is made again"):
        reproduce(*arguments)
    assert (tmp_path / "figure2.json").read_bytes() == whole
    (tmp_path / "figure2.json").write_bytes(b"[]")
    assert "is there already" not in reproduce(*arguments)
    assert (tmp_path / "figure2.json").read_bytes() == whole
