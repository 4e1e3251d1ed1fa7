import argparse
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from repflow.monitor.demo import DemoError
from repflow.monitor.demo.language_model import ByteLanguageModel
from repflow.monitor.demo.models import MODELS, RECIPES, DemoModel, Recipe, choose_models
from repflow.monitor.demo.options import Demo
from repflow.monitor.demo.run import run_demo
from repflow.monitor.demo.summary import summarise
from repflow.monitor.demo.text import ByteWindows, load_corpus
from repflow.monitor.demo.tracking import wandb_mode
from repflow.monitor.sinks import RunFileError, open_run

TEXT = Path(argparse.__file__)
RECIPE = Recipe(sequence=32, batch=4, steps=40, quick_steps=20, learning_rate=1e-2)


def tiny_models() -> list[DemoModel]:
    """The three families with three blocks of width 32."""
    transformer, ssm, hybrid = MODELS["small"]
    size = {"hidden_size": 32, "num_hidden_layers": 3}
    heads = {"mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 8}
    return [
        replace(transformer, settings=dict(transformer.settings) | size | {"intermediate_size": 64}),
        replace(ssm, settings=dict(ssm.settings) | size | {"num_heads": 2, "head_dim": 32, "state_size": 8}),
        replace(hybrid, settings=dict(hybrid.settings) | size | heads | {"attn_layer_indices": [1]}),
    ]


def tiny_demo(folder: Path, models: list[DemoModel] | None = None, seed: int = 0, steps: int = 40) -> Demo:
    return Demo(
        models=tiny_models() if models is None else models,
        recipe=RECIPE,
        steps=steps,
        every_n_steps=10,
        seed=seed,
        text=TEXT,
        folder=folder,
    )


def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which has its jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_demo_from_end_to_end(tmp_path: Path):
    out, folder = console(), tmp_path / "new" / "demo"
    result = run_demo(tiny_demo(folder), out)

    assert result.exit_code == 0
    assert [outcome.model.name for outcome in result.outcomes] == ["transformer", "ssm", "hybrid"]
    for outcome in result.outcomes:
        assert outcome.steps == 40
        assert outcome.first_loss == pytest.approx(5.55, abs=0.15)  # that of guessing: log 256
        assert outcome.last_loss is not None and outcome.last_loss < 4.0
        run = open_run(outcome.run_file)
        assert run["step"].values.tolist() == [0, 10, 20, 30]
        assert run["loss"].values[-1] < run["loss"].values[0]
        assert run.attrs["name"] == outcome.model.name
        assert outcome.tracking is not None and list(Path(outcome.tracking.where).glob("run-*.wandb"))
    assert open_run(folder / "hybrid.db")["block_kind"].values.tolist() == ["ssm", "attention", "ssm"]

    report = folder / "report.html"
    assert result.report == report
    assert "<html" in report.read_text()[:200].lower()
    text = printed(out)
    for part in (
        "2 ssm + 1 attention",
        "40 (4)",
        "V_glob",
        str(folder / "ssm.db"),
        "offline-run-",
        "repflow report ",
        "validation loss",
    ):
        assert part in text
    table = [line for line in text.splitlines() if line.startswith(("│", "┃"))]
    assert len(table) > 10
    assert max(map(len, text.splitlines()[: text.splitlines().index(table[-1])])) <= 100


def test_the_seed_decides_the_losses_and_a_second_demo_is_a_new_attempt(tmp_path: Path):
    models = tiny_models()[:1]
    first, second, other = (
        run_demo(tiny_demo(tmp_path, models, seed, steps=11), console()).outcomes[0] for seed in (3, 3, 4)
    )
    assert (first.first_loss, first.last_loss) == (second.first_loss, second.last_loss)
    assert other.first_loss != first.first_loss
    path = tmp_path / "transformer.db"
    runs = [open_run(path, attempt=attempt) for attempt in (1, 2, 3)]
    assert runs[0]["loss"].values.tolist() == runs[1]["loss"].values.tolist()
    assert runs[0]["loss"].values.tolist() != runs[2]["loss"].values.tolist()
    summary = summarise(path)
    assert summary is not None
    assert summary.snapshots == 2
    assert summary.v_glob == runs[2]["v_glob"].values[-1]
    assert other.attempt == 3
    assert summarise(path, attempt=4) is None  # a training that stored nothing is not shown as the one before it


def test_a_model_that_fails_does_not_stop_the_others(tmp_path: Path):
    _, ssm, _ = tiny_models()
    broken = replace(ssm, name="broken", settings=dict(ssm.settings) | {"num_heads": 3})
    out = console()
    result = run_demo(tiny_demo(tmp_path, [broken, ssm], steps=3), out)
    assert result.exit_code == 1
    assert [outcome.error is None for outcome in result.outcomes] == [False, True]
    assert result.outcomes[1].steps == 3
    assert "broken failed: " in printed(out)
    assert result.report is not None


def test_a_file_in_the_way_is_found_before_training(tmp_path: Path):
    (tmp_path / "transformer.db").write_text("a shopping list")
    with pytest.raises(RunFileError, match=r"transformer\.db"):
        run_demo(tiny_demo(tmp_path), console())


def test_a_run_file_that_cannot_be_written_is_a_failure(tmp_path: Path):
    (tmp_path / "transformer.db").symlink_to(tmp_path / "nowhere" / "transformer.db")
    out = console()
    with pytest.warns(RuntimeWarning, match="RunFileSink failed"):
        result = run_demo(tiny_demo(tmp_path, tiny_models()[:1], steps=11), out)
    assert result.exit_code == 1
    assert result.outcomes[0].steps == 11
    assert result.report is None
    text = printed(out)
    assert "transformer.db: expected 2 snapshots of this training, found 0" in text
    assert "report    none, because no run holds a snapshot" in text
    assert "repflow report" not in text


def test_a_disk_that_fills_up_is_a_failure(tmp_path: Path):
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), models=1, steps=200)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "WANDB_MODE": "disabled"}
    command = [sys.executable, "-c", f"{limit}\n{script}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "RunFileSink failed" in result.stderr
    stored = len(open_run(tmp_path / "transformer.db")["step"])
    assert 0 < stored < 20
    for part in (
        "run file  ",
        "W&B       none: WANDB_MODE=disabled",
        f"expected 20 snapshots of this training, found {stored}",
        "report    none, because `write_report`: cannot write",
        "again     repflow report",
    ):
        assert part in result.stdout


def test_a_report_that_cannot_be_written_hides_nothing_else(tmp_path: Path):
    (tmp_path / "report.html").mkdir()
    _, ssm, _ = tiny_models()
    broken = replace(ssm, name="broken", settings=dict(ssm.settings) | {"num_heads": 3})
    out = console()
    result = run_demo(tiny_demo(tmp_path, [ssm, broken], steps=3), out)
    assert result.exit_code == 1
    assert result.report is None
    assert [type(error) for error in result.errors] == [type(result.outcomes[1].error), OSError]
    run, *tracked, failure, report, _ = printed(out).splitlines()[-6:]
    assert run.startswith("run file")
    assert [line.split()[0] for line in tracked] == ["W&B", "W&B"]
    assert failure.startswith("broken failed: ")
    assert re.fullmatch(
        r"report    none, because `write_report`: cannot write .*report\.html: Is a directory; .*", report
    )


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_demo import console, tiny_demo, tiny_models
from repflow.monitor.demo.run import run_demo
from rich.console import Console
demo = tiny_demo(Path({folder!r}), tiny_models()[:{models}], steps={steps})
sys.exit(run_demo(demo, Console(width=100)).exit_code)
"""


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process whose output can be read, and which is gone at the end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if wanted in line:
            return
    raise AssertionError(f"the process ended first:\n{''.join(lines)}")


def test_ctrl_c_shows_what_is_there_and_exits_with_130(tmp_path: Path):
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), models=2, steps=2000)
    with running([sys.executable, "-c", script]) as process:
        read_until(process, "step 200 of 2000")
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert "interrupted" in text
    assert "inter-token similarity" in text
    assert "ssm:" not in text
    assert (tmp_path / "report.html").exists()
    steps = open_run(tmp_path / "transformer.db")["step"].values.tolist()
    assert len(steps) >= 20
    assert steps == list(range(0, 10 * len(steps), 10))


@pytest.mark.parametrize(("validation", "steps", "losses"), [(1, 0, " – → – "), (2, 11, " → – ")])
def test_ctrl_c_during_validation_shows_what_is_there(
    validation: int, steps: int, losses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    validations = 0

    def interrupt(_: ByteLanguageModel) -> None:
        nonlocal validations
        validations += 1
        if validations == validation:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ByteLanguageModel, "on_validation_start", interrupt)
    out = console()
    result = run_demo(tiny_demo(tmp_path, tiny_models()[:2], steps=11), out)
    assert signal.getsignal(signal.SIGINT) is before
    assert result.exit_code == 130
    assert [(outcome.interrupted, outcome.steps) for outcome in result.outcomes] == [(True, steps)]
    assert (result.report is not None) == (steps > 0)
    text = printed(out)
    assert "interrupted" in text
    assert losses in text
    assert "offline-run-" in text


def test_a_killed_demo_leaves_every_snapshot_before_the_last(tmp_path: Path):
    command = [sys.executable, "-m", "repflow", "demo", "--model", "transformer", "--steps", "60", "--every", "1"]
    command += ["--size", "small", "--text", str(TEXT), "--out", str(tmp_path)]
    with running(command) as process:
        read_until(process, "step 6 of 60")
        process.kill()
    run = open_run(tmp_path / "transformer.db")
    steps = run["step"].values.tolist()
    assert len(steps) >= 5  # step 5, the sixth, was in flight
    assert steps == list(range(len(steps)))
    assert bool(run["inter_token"].notnull().all())
    assert run["loss"].values[-1] < run["loss"].values[0]


@pytest.mark.parametrize(
    ("size", "low", "high"), [("small", 1e6, 3e6), ("medium", 25e6, 35e6), ("large", 140e6, 180e6)]
)
def test_models_of_a_size_are_alike(size: str, low: float, high: float):
    with torch.device("meta"):
        for model in MODELS[size]:
            built = model.build()
            assert low <= sum(parameter.numel() for parameter in built.parameters()) <= high
            assert built.config.num_hidden_layers >= 8
    assert size in RECIPES


def test_models_are_chosen_in_the_order_of_the_table():
    assert [model.name for model in choose_models(["hybrid", "transformer"], "small")] == ["transformer", "hybrid"]
    assert len(choose_models([], "large")) == 3
    with pytest.raises(DemoError, match="--model: expected one of transformer, ssm, hybrid, got 'rnn'"):
        choose_models(["rnn"], "small")
    with pytest.raises(DemoError, match="--size: expected one of small, medium, large, got 'tiny'"):
        choose_models([], "tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps: expected 1 .* got 0"),
        ({"every_n_steps": 0}, "--every: expected 1 .* got 0"),
        ({"seed": -1}, "--seed: expected .* got -1"),
        ({"folder": TEXT}, "--out: expected a folder, and .*argparse.py is a file"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(DemoError, match=message):
        Demo.of_size("small", **options)


def test_the_size_gives_what_is_left_open():
    assert Demo.of_size("small").steps == RECIPES["small"].steps
    quick = Demo.of_size("small", quick=True)
    assert (quick.steps, quick.every_n_steps) == (RECIPES["small"].quick_steps, 2)
    assert Demo.of_size("small", quick=True, steps=201).every_n_steps == 11


def test_windows_overlap_by_the_byte_to_predict():
    windows = ByteWindows(torch.arange(10, dtype=torch.uint8), 4)
    assert len(windows) == 2
    assert windows[0].tolist() == [0, 1, 2, 3, 4]
    assert windows[1].tolist() == [4, 5, 6, 7, 8]
    with pytest.raises(IndexError):
        windows[2]
    assert len(ByteWindows(torch.arange(4, dtype=torch.uint8), 4)) == 0


def test_text_of_a_file_is_cut_in_two(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(200)) * 10)
    corpus = load_corpus(file, sequence=16, batch=4)
    assert bytes(corpus.train.tolist()) + bytes(corpus.validation.tolist()) == bytes(range(200)) * 10
    assert len(corpus.validation) == 100


def test_text_of_a_folder_is_that_of_its_visible_text_files(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.py").write_text("a" * 600)
    (tmp_path / "b.md").write_text("b" * 600)
    (tmp_path / ".hidden").write_text("h" * 600)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0" * 100)
    corpus = load_corpus(tmp_path, sequence=16, batch=4)
    text = bytes(corpus.train.tolist()) + bytes(corpus.validation.tolist())
    assert sorted(text) == [ord("a")] * 600 + [ord("b")] * 600


def test_the_standard_library_is_enough_text():
    corpus = load_corpus(None, sequence=512, batch=16)
    again = load_corpus(None, sequence=512, batch=16)
    assert len(corpus.train) > 2**20
    assert torch.equal(corpus.train, again.train)
    assert b"import " in bytes(corpus.validation.tolist())


def test_the_smallest_text_makes_one_batch_and_one_window_held_out(tmp_path: Path):
    file = tmp_path / "small.txt"
    file.write_text("x" * (9 * 32 + 2))
    corpus = load_corpus(file, sequence=32, batch=8)
    assert len(ByteWindows(corpus.train, 32)) == 8
    assert len(ByteWindows(corpus.validation, 32)) == 1
    file.write_text("x" * (9 * 32 + 1))
    with pytest.raises(DemoError, match=r"at least 290 bytes, .*small\.txt holds 289"):
        load_corpus(file, sequence=32, batch=8)


def test_text_that_is_none(tmp_path: Path):
    with pytest.raises(DemoError, match="no such file or folder"):
        load_corpus(tmp_path / "missing", sequence=32, batch=8)
    with pytest.raises(DemoError, match="holds no text"):
        load_corpus(tmp_path, sequence=32, batch=8)
    (tmp_path / "empty").touch()
    with pytest.raises(DemoError, match="holds no text"):
        load_corpus(tmp_path / "empty", sequence=32, batch=8)
    with pytest.raises(DemoError, match="cannot read /proc/self/mem"):  # unreadable for root as well
        load_corpus(Path("/proc/self/mem"), sequence=32, batch=8)


def test_wandb_is_offline_unless_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode() == "offline"

    login = "machine {} login user password key\n"
    (tmp_path / "_netrc").write_text(login.format("api.wandb.ai"))
    assert wandb_mode() == "online"
    (tmp_path / ".netrc").write_text(login.format("elsewhere.example"))
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert wandb_mode() == "online"
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


# W&B reads its settings once: each mode has a process of its own, which need not import Lightning anew.
TRACKED = """
import os, sys
from pathlib import Path
from repflow.monitor.demo.tracking import start_tracking
assert "wandb" not in sys.modules
for mode in ("", "sideways"):
    if os.fork() == 0:
        os.environ["WANDB_MODE"] = mode
        tracking = start_tracking("run", folder=Path(sys.argv[1], mode))
        tracking.finish(failed=False)
        print(tracking.where)
        sys.exit()
    assert os.wait()[1] == 0
"""


def test_wandb_that_is_told_nothing_or_nonsense(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "NETRC" and "WANDB" not in name}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", TRACKED, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # In one line each.
    assert re.fullmatch(".*/wandb/offline-run-.*\nnone: ValidationError: .*\n", result.stdout)
