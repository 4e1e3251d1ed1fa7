"""Pictures: drawn from what is written alone, the same each time, and nowhere else than asked for."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from repflow.monitor.offline.reproduce.pictures_depth import draw_curves, draw_matrices, draw_token_maps, draw_variation
from repflow.monitor.offline.reproduce.written import Result, read_result
from tests.monitor.offline.reproduce.conftest import reproduce
from tests.monitor.offline.reproduce.test_random_targets import FIGURES


def copied(folder: Path, target: Path, pattern: str = "*") -> Path:
    """Some of what is written, without the work behind it."""
    target.mkdir()
    for path in folder.glob(f"{pattern}.*"):
        shutil.copy(path, target)
    return target


def texts(path: Path) -> str:
    return "".join(ElementTree.parse(path).getroot().itertext())


@pytest.mark.parametrize("target", [*(f"figure{number}" for number in range(1, 8)), "table1", "table2"])
def test_every_target_has_its_pictures(target: str, page: Path):
    with Image.open(page.parent / f"{target}.png") as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors() or ()) > 20
    text = texts(page.parent / f"{target}.svg")
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


def test_the_legend_tells_what_the_checkpoint_ran_on(checkpoints: Path, tmp_path: Path):
    folder = copied(checkpoints, tmp_path / "copy", "figure3")
    reproduce("draw", folder)
    assert "pretrained, on kvpr and mdqa" in texts(folder / "figure3.svg")


def test_each_length_has_its_panel(models: Path, tmp_path: Path):
    lengths = ("--length", "16", "--length", "32")
    reproduce("figure2", "--init", "--model", models / "mamba2", *lengths, "--samples", "2", "-o", tmp_path)
    found = texts(tmp_path / "figure2.svg")
    assert "16 tokens" in found and "32 tokens" in found


@pytest.mark.parametrize(("target", "draw"), [("figure1", draw_token_maps), ("figure4", draw_matrices)])
def test_blocks_and_states_are_counted_in_whole_numbers(
    target: str, draw: Callable[[Result], Figure], checkpoints: Path
):
    result = read_result(checkpoints, target)
    assert result is not None
    axis = draw(result).axes[0]
    for ticks in (axis.get_xticks(), axis.get_yticks()) if target == "figure4" else (axis.get_xticks(),):
        assert len(ticks) > 1 and all(tick == int(tick) for tick in ticks)


def of_matrices(*names: str) -> Result:
    about = {"choices": {"cka_estimator": "unbiased"}}
    return Result(target="figure4", rows=[], arrays={name: np.eye(3) for name in names}, about=about)


def grid(figure: Figure) -> list[list[str]]:
    """Titles of the matrices, row by row; an empty cell must not show."""
    rows: dict[int, list[str]] = {}
    for axis in figure.axes:
        place = axis.get_subplotspec()
        if place is not None and axis.images:
            rows.setdefault(place.rowspan.start, []).append(axis.get_title().replace("\n", ": "))
            assert place.colspan.start == len(rows[place.rowspan.start]) - 1
        assert bool(axis.images or axis.collections) == axis.get_visible()
    return [rows[row] for row in range(len(rows))]


TASKS = ("kvpr", "mdqa", "mean")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            [*(f"a/{task}/2048" for task in TASKS), "b/kvpr/2048", *(f"c/{task}/2048" for task in TASKS)],
            [
                [f"a: {task}, 2,048 tokens" for task in TASKS],
                ["b: kvpr, 2,048 tokens"],
                [f"c: {task}, 2,048 tokens" for task in TASKS],
            ],
        ),
        (
            [f"x/{model}/{task}/{length}" for model in "ab" for length in (300, 2048) for task in TASKS],
            [
                [f"x/{model}: {task}, {length} tokens" for task in TASKS]
                for model in "ab"
                for length in ("300", "2,048")
            ],
        ),
        (
            [f"{model}/kvpr/{length}" for model in "abc" for length in (300, 2048)],
            [[f"{model}: kvpr, {length} tokens" for length in ("300", "2,048")] for model in "abc"],
        ),
    ],
    ids=["some on one task", "several lengths", "one task"],
)
def test_a_model_and_length_is_a_row_of_matrices(names: list[str], expected: list[list[str]]):
    """Or a model, where one task alone was measured."""
    assert grid(draw_matrices(of_matrices(*names))) == expected


@pytest.mark.parametrize("draw", [draw_curves, draw_variation])
def test_as_many_models_as_one_likes_are_told_apart(draw: Callable[[Result], Figure]):
    """Also those of which there is no colour left."""
    same = {"length": 300, "value": 0.5, "v_loc": 0.5, "v_glob": 0.5}
    rows = [same | {"model": f"m{model}", "task": task} for model in range(14) for task in ("kvpr", "mdqa")]
    figure = draw(Result(target="figure2", rows=rows, about={"comparison": []}))
    lines = [line for line in figure.axes[0].lines if len(np.asarray(line.get_xdata()))]  # the paper has no points
    assert len(lines) == len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 28
    told = {(line.get_color(), line.get_marker()) for line in figure.legends[0].get_lines()[:14]}
    assert len(told) == 14


def test_how_the_papers_numbers_are_read_is_on_the_page(page: Path):
    assert "Layer l is read as state l, and a layer of which no other is named" in page.read_text()
