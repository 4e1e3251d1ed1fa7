"""examples/regularizer, on tiny models: every file that it promises is written, and the term acts where it says."""

import csv
import json
import runpy
import shutil
import sys
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "regularizer"
PAPER = FOLDER.parent / "paper"
TINY = ("--tiny", "--steps", "10", "--rows", "2", "--samples", "1", "--every", "5")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PAPER)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1] / "src"))  # of the processes that compare.py starts


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text, folder = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("corpus")
    for name in ("argparse", "ast", "cmd", "csv", "dis", "enum", "heapq", "inspect", "shlex", "uuid"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PAPER)
        import_module("_corpus").prepare(folder, 1.0, text)
    return folder


def run_script(monkeypatch: pytest.MonkeyPatch, script: str, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    runpy.run_path(str(FOLDER / script), run_name="__main__")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def trained(monkeypatch: pytest.MonkeyPatch, corpus: Path, out: str, *options: object) -> dict[str, Any]:
    run_script(monkeypatch, "regularize.py", *TINY, "--corpus", corpus, "-o", out, *options)
    return json.loads((Path(out) / "result.json").read_text())


def test_with_and_without_begin_alike_and_part(monkeypatch: pytest.MonkeyPatch, corpus_folder: Path) -> None:
    given = (monkeypatch, corpus_folder)
    without = trained(*given, "without", "--family", "hybrid", "--strength", "none")
    acted = trained(*given, "with", "--family", "hybrid", "--strength", 5, "--target", -1, "--layers", "late")
    assert without["regularizer"] is None
    assert acted["regularizer"] == {"step": 10, "layers": [3], "strength": [5.0]}
    assert without["tokens"] == acted["tokens"] == 10 * 2 * 512
    curves = [read(Path(out) / "similarity.csv") for out in ("without", "with")]
    assert [int(row["step"]) for row in curves[0]] == [0] * 4 + [5] * 4
    first, last = ([float(curve[row]["inter_token"]) for curve in curves] for row in (3, 7))
    assert first[0] == first[1] and last[1] < last[0] - 0.01
    assert [entry["pairs"] for entry in acted["retrieval"]] == [2, 5, 9]
    assert read(Path("with") / "loss.csv")[0]["step"] == "10"


def test_all_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: Any, corpus_folder: Path, tmp_path: Path) -> None:
    """One of two models is there already, and a pilot of 20 steps in 2 seconds; the other is trained by a process."""
    shutil.copytree(corpus_folder, tmp_path / "work" / "corpus")
    without = trained(monkeypatch, corpus_folder, "work/transformer-without-0", "--strength", "none")
    (tmp_path / "work/transformer-pilot-0").mkdir()
    choices = without["choices"] | {"steps": None, "seconds": 0.1}
    pilot = without | {"steps": 20, "seconds": 2.0, "choices": choices}
    (tmp_path / "work/transformer-pilot-0/result.json").write_text(json.dumps(pilot))
    options = [option for option in TINY if option not in ("--steps", "10")]
    places = ("--work", "work", "--results", "results", "--families", "transformer", "--seeds", 0, "--seconds", 1)
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, "compare.py", *places, *options)
    assert ended.value.code == 0, capsys.readouterr().out
    runs, summary = read(Path("results/runs.csv")), read(Path("results/summary.csv"))
    assert [(row["regularizer"], row["pairs"]) for row in runs] == [
        (arm, pairs) for arm in ("without", "with") for pairs in ("2", "5", "9")
    ]
    assert len(summary) == 6 and all(row["seeds"] == "1" and row["text_nats_std"] == "0.0" for row in summary)
    curves = read(Path("results/similarity.csv"))
    assert len(curves) == 2 * 2 * 4
    (reached,) = (float(row["inter_token"]) for row in curves[:8] if (row["step"], row["state"]) == ("5", "1"))
    assert {row["target"] for row in runs} == {"", str(round(reached / 2, 4))} and runs[3]["steps"] == "10"
    # What is there is not taken for a model of other options: neither pilots, nor those without, nor those with.
    whole = {path: path.read_bytes() for path in Path("work").rglob("result.json")}
    for changed, model, told in (
        (["--seconds", 2], "pilot", "--seconds 0.1, not 0.2"),
        (["--rows", 4], "pilot", "--rows 2, not 4"),
        (["--steps", 10, "--layers", "late"], "without", r"--layers \['early'\], not \['late'\]"),
        (["--steps", 10, "--target", 0.7], "with", f"--target {round(reached / 2, 4)}, not 0.7"),
        (["--steps", 10, "--strength", 0.1], "with", "--strength controlled, not 0.1"),
    ):
        with pytest.raises(
            SystemExit, match=f"work/transformer-{model}-0: expected .* found one made with {told}; rem"
        ):
            run_script(monkeypatch, "compare.py", *places, *options, *changed)
    assert {path: path.read_bytes() for path in Path("work").rglob("result.json")} == whole
    run_script(monkeypatch, "draw.py", "results")
    for name in ("similarity", "retrieval"):
        assert Path(f"results/{name}.png").stat().st_size > 10_000
        assert "State-space" not in (drawn := Path(f"results/{name}.svg").read_text()) and "Transformer" in drawn
    assert "target" in Path("results/similarity.svg").read_text()
    for table in ("runs", "similarity"):  # as where the models with the regularizer failed
        lines = Path(f"results/{table}.csv").read_text().splitlines(keepends=True)
        Path(f"results/{table}.csv").write_text("".join(line for line in lines if ",with," not in line))
    run_script(monkeypatch, "draw.py", "results")
    assert "target" not in (drawn := Path("results/similarity.svg").read_text()) and "Transformer" in drawn


def test_a_trial_has_places_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = import_module("compare")
    for given, work, results in (
        (["--tiny"], Path("regularizer-work-tiny"), Path("regularizer-work-tiny/results")),
        ([], Path("regularizer-work"), FOLDER / "results"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare.py", *given])
        options, _ = compare.parse()
        assert (options.work, options.results) == (work, results)
    parsed = import_module("regularize").parse(["--tiny", "-o", "out"])
    assert (parsed.text_mib, parsed.tiny) == (1.0, True)


def test_steps_are_of_all_families_or_of_one(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    compare = import_module("compare")

    def parse(*words: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        return compare.parse()[0]

    assert parse("--steps", 900, "ssm=300").steps == {"ssm": 300, "hybrid": 900, "transformer": 900}
    assert parse("--families", "ssm", "--steps", "ssm=300").steps == {"ssm": 300} and parse().steps is None
    for words, told in (
        (("--steps", "ssm=300"), "--steps: expected a number for every family, got none for hybrid, transformer"),
        (("--steps", "rnn=300"), "--steps: expected one of ssm, hybrid, transformer before '=', got 'rnn'"),
        (("--per-gpu", 0), "--per-gpu: expected 1 or more, got 0"),
    ):
        with pytest.raises(SystemExit):
            parse(*words)
        assert told in capsys.readouterr().err


def test_a_strength_is_a_number_or_a_word(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "regularize.py", "--strength", "some", "-o", "out")
    assert "--strength: expected 'none', 'controlled' or a number, got 'some'" in capsys.readouterr().err
