"""`repflow tasks`: what it shows, and what it says where it cannot."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from repflow.monitor.cli import app
from repflow.monitor.offline.tasks_kvpr import KeyValueRetrieval
from tests.monitor.offline import questions, tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small model and questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPFLOW_TRACEBACK", raising=False)
    tiny.save(tmp_path / "model", "gpt_neo")
    questions.write(tmp_path / "questions.jsonl.gz")
    return tmp_path


def test_samples_of_both_tasks(folder: Path):
    arguments = ["tasks", "--tokenizer", "model", "--length", "300", "--length", "4K", "--data", "questions.jsonl.gz"]
    result = CliRunner().invoke(app, [*arguments, "--seed", "7", "--samples", "2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    first = next(line for line in lines if line.startswith("kvpr: "))
    items = int(first.split()[1])
    sample = KeyValueRetrieval(items=items, seed=7).sample(1)
    assert first == f"kvpr: {items} pairs for about 300 tokens; gold at {', '.join(map(str, range(items)))}; seed 7"
    assert "kvpr: skipped 4,096 tokens: the model's window is 512" in lines
    assert "mdqa: skipped 4,096 tokens: the model's window is 512" in lines
    tokens = len(tiny.tokenizer()(sample.prompt)["input_ids"])
    head = lines.index(f"sample 1: gold at {sample.position}, class {sample.label}, {tokens} tokens")
    assert lines[head + 1] == f"  {sample.prompt.splitlines()[0]}"
    assert f"  → {sample.answer}" in lines
    assert any(line.startswith("  Document [1](Title: Mill of ") for line in lines)


def test_a_task_that_does_not_fit_leaves_the_other_be(folder: Path):
    questions.write_long(folder / "long.jsonl")
    result = CliRunner().invoke(app, ["tasks", "mdqa", "kvpr", "--tokenizer", "model", "--data", "long.jsonl"])
    assert result.exit_code == 0, result.output
    first, second, *_ = result.output.splitlines()
    assert first.startswith("mdqa: skipped 300 tokens of mdqa: expected 2 documents to fit into 512, the window of the")
    assert second.startswith("kvpr: ") and "pairs for about 300 tokens" in second


def test_classes_are_spread_over_the_items_of_a_length(folder: Path):
    arguments = ["tasks", "kvpr", "--tokenizer", "model", "--length", "300"]
    every = CliRunner().invoke(app, arguments).output.splitlines()[0]
    last = int(every.split()[1]) - 1
    assert last >= 3
    result = CliRunner().invoke(app, [*arguments, "--classes", "3"])
    assert result.exit_code == 0, result.output
    assert f"; gold at 0, {(last + 1) // 2}, {last}; seed 0" in result.output.splitlines()[0]
    result = CliRunner().invoke(app, [*arguments, "--classes", str(last + 2)])
    assert result.exit_code == 2 and f"expected from 2 to {last + 1} tested positions" in result.output


def test_without_a_tokenizer(folder: Path):
    result = CliRunner().invoke(app, ["tasks", "kvpr", "--items", "40", "--classes", "2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "kvpr: 40 pairs; gold at 0, 39; seed 0"
    assert "  … 34 lines …" in lines
    whole = CliRunner().invoke(app, ["tasks", "kvpr", "--items", "40", "--whole"]).output
    prompt = KeyValueRetrieval(items=40).sample(0).prompt
    assert "\n".join(f"  {line}" for line in prompt.splitlines()) in whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --tokenizer NAME_OR_PATH, to find how many items make --length tokens, or --items NUMBER"),
        (["squad", "--items", "3"], "TASK: expected kvpr or mdqa, got 'squad'"),
        (["kvpr", "--items", "1"], "kvpr: expected 2 pairs or more to find one among, got 1"),
        (["kvpr", "--items", "3", "--samples", "0"], "--samples: expected 1 or more, got 0"),
        (["kvpr", "--tokenizer", "model", "--length", "long"], "--length: expected a number of tokens"),
        (["kvpr", "--tokenizer", "nowhere/at/all"], "found nothing there"),
        (["kvpr", "--tokenizer", "owner/absent"], "owner/absent: expected a tokenizer beside the model, found none"),
        (["kvpr", "--tokenizer", "bare"], "bare: expected a tokenizer beside the model, found none that loads"),
        (["mdqa", "--items", "3", "--data", "absent.jsonl"], "absent.jsonl: expected lines of JSON"),
        (["mdqa", "--items", "30", "--data", "questions.jsonl.gz"], "found 13 among 14; ask for fewer documents"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], message: str, folder: Path):
    tiny.config("gpt_neo").save_pretrained(folder / "bare")
    result = CliRunner().invoke(app, ["tasks", *arguments])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("repflow: ")
    assert message in line
