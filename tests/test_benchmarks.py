"""The benchmarks, tried out on a CPU: what their results must say, and the numbers in the docs made from them."""

import csv
import os
import shutil
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PROVENANCE = ["device", "driver", "torch", "triton", "python", "commit", "date"]


def run(script: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a benchmark as `make bench` does, on a machine without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src"), "REPFLOW_COMMIT": "abc"}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of a quick run of the kernels."""
    folder = tmp_path_factory.mktemp("results")
    done = run("kernels.py", "--quick", "--out", folder / "kernels.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a module of `benchmarks/`, whose files import each other by their bare names."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_case_is_measured_and_checked(results: Path):
    cases: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in read(results / "kernels.csv"):
        assert row["checked"] == "yes" and float(row["ms"]) > 0
        case = tuple(row[name] for name in ("quantity", "S", "B", "T", "D", "dtype", "input"))
        cases.setdefault(case, {})[row["implementation"]] = row
    (product, *statistics) = cases.values()
    assert list(product) == ["128³"]
    quantities = [next(iter(case.values()))["quantity"] for case in statistics]
    assert quantities == 3 * ["depth and token sums"] + 5 * ["pairwise HSIC"] + 2 * ["similarity gradient"]
    for case in statistics:
        assert {"floor", "reference", "repflow"} <= set(case)
        ours = case["repflow"]
        if ours["quantity"] == "pairwise HSIC":
            assert float(ours["cka_error"]) <= (1e-4 if ours["dtype"] == "float32" else 2e-3)
        else:
            rounding = 8e-3 if ours["quantity"] == "similarity gradient" else 1e-5  # of a gradient in bfloat16
            assert float(ours["cosine_error"]) <= 1e-5 and float(ours["v_error"]) <= rounding


def test_results_say_where_they_come_from_but_name_no_machine(results: Path):
    file = results / "kernels.csv"
    rows = read(file)
    assert list(rows[0])[-len(PROVENANCE) :] == PROVENANCE
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert {row["device"] for row in rows} == {"cpu"}
    text = file.read_text(encoding="utf-8")
    assert socket.gethostname() not in text and str(ROOT) not in text


def test_without_a_gpu_it_says_so():
    done = run("kernels.py")
    assert done.returncode != 0
    assert "needs a CUDA GPU and found none; --quick" in done.stderr


def suite_of(result: float) -> SimpleNamespace:
    """Something to measure whose truth is 1 and of which repflow says `result`."""
    return SimpleNamespace(
        QUANTITY="a number",
        tolerances=lambda case: {"cka_error": 0.1},
        floor=lambda case, states, product: None,
        calls=lambda case, states, mask: {"reference": lambda: 1.0, "rough": lambda: 3.0, "repflow": lambda: result},
        errors=lambda got, truth: {"cka_error": abs(got - truth)},
    )


@pytest.mark.parametrize(("result", "shown"), [(1.05, True), (1.2, False), (float("nan"), False)])
def test_a_wrong_repflow_gets_no_time_and_others_get_their_error(load, result: float, shown: bool):
    kernels, cases = load("kernels"), load("_cases")
    case = cases.Case((2, 1, 4, 8))
    rows = {row["implementation"]: row for row in kernels.measure(suite_of(result), case, None, torch.device("cpu"))}
    assert rows["rough"]["cka_error"] == 2
    assert ("repflow" in rows) == shown


def test_an_error_on_the_first_input_is_not_forgotten(load):
    kernels, cases = load("kernels"), load("_cases")
    results = iter([1.5, 1.0])
    suite = suite_of(0)
    suite.calls = lambda case, states, mask: {"reference": lambda: 1.0, "repflow": lambda: next(results)}
    _, checked = kernels.check(suite, cases.Case((2, 1, 4, 8)), torch.device("cpu"))
    assert checked["repflow"].errors == {"cka_error": 0.5}


def test_a_missing_value_is_no_small_error(load):
    measure = load("_measure")
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert measure.largest_error(nan, one) == measure.largest_error(one, nan) == float("inf")
    assert measure.largest_error(nan, nan) == 0
    assert measure.largest_error(torch.tensor([3.0]), torch.tensor([2.0]), relative=True) == 0.5


def test_the_commit_is_told_where_there_is_no_repository(load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    module: ModuleType = load("_provenance")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("REPFLOW_COMMIT", "0123abc")
    module.write_rows(tmp_path / "new" / "rows.csv", [{"ms": 1 / 3, "note": None}, {"ms": 2, "model": "a, b"}])
    first, second = read(tmp_path / "new" / "rows.csv")
    assert list(first) == ["ms", "note", "model", *PROVENANCE]
    assert (first["ms"], first["note"], first["model"], first["commit"]) == ("0.33333", "", "", "0123abc")
    assert (second["ms"], second["model"]) == ("2", "a, b")
    monkeypatch.delenv("REPFLOW_COMMIT")
    assert module.provenance()["commit"] == "unknown"
    with pytest.raises(ValueError, match="torch"):
        module.write_rows(tmp_path / "rows.csv", [{"torch": "mine"}])


def test_a_changed_tree_is_told(load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    module: ModuleType = load("_provenance")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = module.provenance()["commit"]
    assert len(clean) == 12 and not clean.endswith("-dirty")
    module.write_rows(tmp_path / "benchmarks" / "results" / "kernels.csv", [{"ms": 1}])
    assert module.provenance()["commit"] == clean
    (tmp_path / "kernel.py").touch()
    assert module.provenance()["commit"] == f"{clean}-dirty"


def test_the_pages_say_what_the_results_say():
    done = run("table.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_stale_pages_are_noticed(results: Path, tmp_path: Path):
    readme = shutil.copy(ROOT / "README.md", tmp_path)
    page = shutil.copy(ROOT / "docs" / "performance.md", tmp_path)
    options = ("--results", results, "--readme", readme, "--performance", page)
    stale = run("table.py", *options, "--check")
    assert stale.returncode == 1 and "performance.md is not what the results say; run: python" in stale.stdout
    assert "README.md is not what the results say" in stale.stdout  # the results are of kernels alone
    assert run("table.py", *options).returncode == 0
    assert run("table.py", *options, "--check").returncode == 0
    _, heading, section = Path(page).read_text(encoding="utf-8").partition("## The kernels")
    section = section.partition("<!--")[0]
    assert heading and section.count("| **repflow** |") == 3 and "../benchmarks/results/kernels.csv" in section
    assert "1 state of 2 × 16 tokens" in section.replace("\n", " ")
    assert all(len(line) <= 120 for line in section.splitlines() if line[:1] != "|")
    # Without results there is nothing to show.
    assert "## Speed" not in Path(readme).read_text(encoding="utf-8")
    assert run("table.py", "--results", tmp_path, "--readme", readme, "--performance", page).returncode == 0
    assert "## The kernels" not in Path(page).read_text(encoding="utf-8")


def test_the_overhead_of_a_step_is_shown(load, tmp_path: Path):
    shared = {"model": "GPTNeoX tiny", "layers": 3, "tokens_per_step": 1234, "note": "a note", "buffer_mib": 64.0}
    bare = {
        **shared,
        "variant": "bare",
        "ms": 100.0,
        "overhead_percent": 0.0,
        "standard_error_percent": 0.0,
        "syncs": 0,
    }
    rare = {**shared, "variant": "every 50th", "overhead_percent": -0.031, "standard_error_percent": 0.012}
    costs = {"extra_memory_mib": 65.5, "cpu_us": 512.0}
    load("_provenance").write_rows(tmp_path / "overhead.csv", [{**bare, **dict.fromkeys(costs)}, {**rare, **costs}])
    lines = load("table").steps_section(tmp_path).splitlines()
    assert "| GPTNeoX tiny, 3 blocks, 1,234 tokens | bare | 100 | – | – | 64 | 0 | – |" in lines
    assert "| GPTNeoX tiny, 3 blocks, 1,234 tokens | every 50th | – | -0.03 ± 0.01 | 65.5 | 64 | – | 512 |" in lines
    assert lines.count("GPTNeoX tiny: a note.") == 1


def test_offline_analysis_is_measured_and_checked(tmp_path: Path):
    done = run("offline.py", "--quick", "--out", tmp_path / "offline.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(tmp_path / "offline.csv")
    assert [(row["name"], row["variant"], row["budget"]) for row in rows] == [
        ("GPTNeoX tiny", "bare", ""),
        ("GPTNeoX tiny", "without CKA", "95"),
        ("GPTNeoX tiny", "with CKA", "90"),
        ("Mamba2 tiny", "bare", ""),
        ("Mamba2 tiny", "without CKA", ""),
        ("Mamba2 tiny", "with CKA", ""),
        ("probes, 3 states × 2 seeds", "", "10"),
    ]
    for row in rows:
        assert row["checked"] == "yes" and 0 <= float(row["error_share_of_tolerance"]) <= 1
        assert float(row["seconds"]) > 0
    assert all(float(row["tokens_per_second"]) > 0 for row in rows[:-1])
    assert list(rows[0])[-len(PROVENANCE) :] == PROVENANCE


def test_offline_needs_a_gpu_or_to_be_quick():
    done = run("offline.py")
    assert done.returncode != 0 and "needs a CUDA GPU and found none; --quick" in done.stderr


@pytest.fixture
def tiny_extraction(load):
    """The tiny model of the benchmark on a CPU, its case, and the choices of an extraction."""
    extraction = load("_extraction")
    case = extraction.QUICK_CASES[0]
    options = import_module("repflow.monitor.offline.extraction").ExtractionOptions(batch_tokens=case.batch_tokens)
    return extraction, extraction.load(case, torch.device("cpu")), case, options


def test_a_wrong_extraction_gets_no_time(tiny_extraction, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    extraction, loaded, case, options = tiny_extraction
    assert extraction.check(loaded, case, options, tmp_path / "right") <= 1
    recorder = import_module("repflow.monitor.offline.recorder").StateRecorder
    add = recorder._add

    def slightly_wrong(self, captured):
        captured.states[1:] *= 1 + 0.01 * torch.arange(captured.states.shape[2]).view(-1, 1)
        add(self, captured)

    calls = iter(range(10**6))
    # The first forwards are those of the extraction, whose states are changed; those of the reference are not.
    monkeypatch.setattr(recorder, "_add", lambda self, seen: (slightly_wrong if next(calls) < 2 else add)(self, seen))
    with pytest.raises(RuntimeError, match=r"no time is shown, for these differ from the reference: .*norms"):
        extraction.check(loaded, case, options, tmp_path / "wrong")


def test_wrong_probes_get_no_time(load, monkeypatch: pytest.MonkeyPatch):
    probes = load("_probes")
    train = import_module("repflow.monitor.offline.probing").train_probes
    assert probes.measure_probes(probes.QUICK_CASES[0], 1, torch.device("cpu"))["checked"] == "yes"

    def of_other_features(take, *args, **options):
        return train(lambda wanted: take(wanted).roll(1, 1), *args, **options)

    monkeypatch.setattr("repflow.monitor.offline.probing.train_probes", of_other_features)
    with pytest.raises(RuntimeError, match="no time is shown, for an accuracy is"):
        probes.measure_probes(probes.QUICK_CASES[0], 1, torch.device("cpu"))


def test_offline_analysis_is_shown(load, tmp_path: Path):
    model = {"part": "extraction", "name": "Mamba2 tiny", "states": 3, "samples": 16, "tokens": 2048, "note": "a note"}
    bare = {**model, "variant": "bare", "tokens_per_second": 98765.4, "percent_of_bare": 100.0, "runs": 5}
    with_cka = {**bare, "variant": "with CKA", "tokens_per_second": 91234.5, "percent_of_bare": 92.37, "budget": 90}
    bare["budget"] = None
    shares = {"percent_low": 91.0, "percent_high": 93.04}
    probes = {"part": "probes", "states": 65, "seeds": 5, "samples": 20_000, "features": 2560, "classes": 11}
    probes |= {"name": "probes, 65 states"}
    rows = [{**bare, **shares}, {**with_cka, **shares}, {**probes, "epochs": 150, "seconds": 4.321}]
    load("_provenance").write_rows(tmp_path / "offline.csv", rows)
    lines = load("table").performance_section(tmp_path).splitlines()
    assert "| Mamba2 tiny, 2 blocks | 16 × 2,048 tokens | bare | 98,765 | – | – |" in lines
    assert "| Mamba2 tiny, 2 blocks | 16 × 2,048 tokens | with CKA | 91,234 | 92.4 (91.0 to 93.0) | 90 |" in lines
    assert "| 65 | 5 | 20,000 | 2,560 | 11 | 150 | 4.32 |" in lines
    assert lines.count("Mamba2 tiny: a note.") == 1
    assert all(len(line) <= 120 for line in lines if line[:1] != "|")


def test_rows_of_several_commits_say_which(load):
    shared = dict.fromkeys(("device", "driver", "torch", "triton", "python"), "one") | {"date": "2026-01-02"}
    rows = [{**shared, "commit": commit, "name": name} for commit, name in (("a", "x"), ("a", "y, z"), ("b", "w"))]
    told = load("table").origin(rows, "some.csv", "", "name")
    assert "2026-01-02, commit a for x, y; 2026-01-02, commit b for w; medians" in told.replace("\n", " ")
    assert "2026-01-02, commit a; medians" in load("table").origin(rows[:2], "some.csv", "", "name")
