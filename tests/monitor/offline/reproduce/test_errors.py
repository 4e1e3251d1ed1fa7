"""What cannot be done is said in one line, with what to do about it."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from repflow.monitor.cli import app
from repflow.monitor.offline.recorder import StateRecorder
from tests.monitor.offline import questions, tiny


def fails(*arguments: str | Path) -> str:
    """The line that is said."""
    result = CliRunner().invoke(app, ["reproduce", *map(str, arguments), "--no-pictures"])
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("repflow: ")]
    return line


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory beside the models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPFLOW_TRACEBACK", raising=False)
    for kind in tiny.KINDS:
        (tmp_path / kind).symlink_to(models / kind)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure8"], "TARGET: expected some of figure1, figure2, figure3, figure4, figure5, figure6, figure7, table1"),
        (["figure1", "report"], "got 'report', which stands first and alone: `repflow reproduce report FOLDER`"),
        (["figure2", "--model", "./absent"], "./absent: expected a folder with a model, owner/name on"),
        (["figure3", "--init", "--model", "opt-9b"], "or one of gpt-neo-2.7b, pythia-2.8b, mamba-2.8b, mamba2-2.7b"),
        (["figure3", "--init", "--scheme", "he"], "--scheme: expected default or gaussian or xavier or kaiming, got"),
        (["figure3", "--init", "--policy", "all"], "--policy: expected default or trivial or scheme, got 'all'"),
        (["figure2", "--task", "squad"], "--task: expected kvpr or mdqa, got 'squad'"),
        (["figure2", "--states", "last"], "--states: expected residual or hf, got 'last'"),
        (["figure2", "--dtype", "int8"], "--dtype: expected float32 or bfloat16 or float16, got 'int8'"),
        (["figure2", "--device", "abacus"], "--device: expected one such as cpu, cuda or cuda:1, got 'abacus'"),
        (["figure2", "--device", "cuda:99"], "--device: expected one of "),
        (["figure2", "-o", "poem.jsonl"], "poem.jsonl is a file; name another"),
        (["figure2", "-o", "poem.jsonl/figures"], "poem.jsonl is a file; name another"),
        (["figure2", "--length", "long"], "--length: expected a number of tokens"),
        (["figure2", "--samples", "0"], "--samples: expected 1 or more, got 0"),
        (["figure2", "--batch-tokens", "0"], "--batch-tokens: expected 1 or more, got 0"),
        (["figure2", "--classes", "1"], "--classes: expected 2 or more, got 1"),
        (["figure2", "--prompt-seed", "-1"], "--prompt-seed: expected 0 or more, got -1"),
        (["figure2", "--model", "gpt_neo", "--revision", "step1"], "--revision: expected models on the Hugging Face"),
        (["figure2", "--init", "--revision", "step1"], "--revision: expected checkpoints, whose weights differ"),
        (["figure2", "--init", "--device-map", "auto"], "--device-map: expected a checkpoint to spread"),
        (["table1", "--init"], "table1: expected prompts of a task; probes read the gold position"),
        (["figure3", "--init", "--length", "300", "--length", "1K"], "--length: expected one length for figures 3"),
        (["figure3", "--init", "--model", "gpt_neo", "--length", "4K"], "figure3: nothing could be measured"),
        (["figure2", "--model", "gpt_neo", "--length", "4K"], "figure2: nothing could be measured; ask for a smaller"),
        (["draw", "."], "expected figures or tables in it, found none of figure1.json"),
        (["report", "absent"], "absent: expected a folder that `repflow reproduce` has written, found none"),
        (["figure2", "--model", "gpt_neo", "--data", "poem.jsonl", "--length", "300"], "poem.jsonl, line 1: expected"),
        (["figure2", "--model", "gpt_neo", "--tokenizer", "short", "--length", "300"], "for 200 (model_max_length)"),
        (["figure2", "--model", "bare", "--length", "300"], "bare: expected a checkpoint, found no weights"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("untyped")
def test_an_error_is_one_line(arguments: list[str], message: str, folder: Path):
    (folder / "poem.jsonl").write_text("no line of this is JSON\n")
    tiny.config("gpt_neo").save_pretrained(folder / "bare")
    short = tiny.tokenizer().from_pretrained(folder / "gpt_neo", model_max_length=200)
    short.save_pretrained(folder / "short")
    tiny.config("gpt_neo").save_pretrained(folder / "short")
    assert message in fails(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure2", "--model", "absent"], "absent: expected a folder with a model"),
        (["figure3", "--init", "--model", "absent"], "absent: expected a folder with a model"),
        (["figure2", "--model", "bare"], "bare: expected a checkpoint, found no weights"),
        (["figure2", "--data", "absent.jsonl"], "absent.jsonl: expected lines of JSON"),
        (["figure2", "--classes", "99"], "kvpr: expected from 2 to "),
        (["table1", "--samples", "6"], "pairs: probes: expected samples of all "),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_done_is_told_before_anything_is_measured(arguments: list[str], message: str, folder: Path):
    """Not after hours with the first model, or the first task."""
    tiny.config("gpt_neo").save_pretrained(folder / "bare")
    given = ["--model", "gpt_neo", *arguments[1:], "--length", "300", "-o", "out"]
    if "--data" not in given:
        given += ["--data", str(questions.write(folder / "questions.jsonl.gz"))]
    assert message in fails(arguments[0], *given)
    assert not (folder / "out").exists()


def test_all_leaves_out_what_random_ids_cannot_show(folder: Path):
    few = ("--length", "32", "--seeds", "1", "--scheme", "gaussian", "--policy", "scheme", "--samples", "2")
    result = CliRunner().invoke(app, ["reproduce", "all", "--init", "--model", "gpt_neo", *few, "--no-pictures"])
    assert result.exit_code == 0, result.output
    assert "table1: left out: probes read the gold position of a task, and random ids have none" in result.output
    made = {path.stem for path in (folder / "repflow-paper").glob("*.json")}
    assert made == {*(f"figure{number}" for number in range(1, 8)), "table2"}


def test_memory_that_does_not_suffice(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def measure(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    monkeypatch.setattr(StateRecorder, "measure", measure)
    line = fails("figure3", "--init", "--model", "gpt_neo", "--length", "32")
    assert "out of memory: expected room for the model and one sequence; take a smaller dtype" in line
    assert "out of memory with a single sequence" in fails("figure2", "--init", "--model", "gpt_neo", "--length", "32")


def test_questions_of_one_file_are_not_those_of_another(folder: Path):
    """A file that changed is another one: what was measured on the first is no longer what is asked for."""
    file = questions.write(folder / "questions.jsonl.gz")
    arguments = ["figure2", "--model", "gpt_neo", "--data", str(file), "--task", "mdqa", "--length", "300"]
    arguments += ["--samples", "11", "--no-pictures"]
    assert CliRunner().invoke(app, ["reproduce", *arguments]).exit_code == 0
    assert "is there already" in CliRunner().invoke(app, ["reproduce", *arguments]).output
    questions.write(file, list(reversed(questions.records())))
    assert "11 prompts" in CliRunner().invoke(app, ["reproduce", *arguments]).output
