"""The tasks: prompts to the letter, positions, balance, determinism, and their data."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.tasks import AbstractTask
from repflow.monitor.offline.tasks_data import read_questions
from repflow.monitor.offline.tasks_kvpr import KeyValueRetrieval
from repflow.monitor.offline.tasks_mdqa import MultiDocumentQA, Question, normalise
from tests.monitor.offline import questions


@pytest.fixture
def asked(tmp_path: Path) -> tuple[Question, ...]:
    return read_questions(questions.write(tmp_path / "questions.jsonl.gz"))


@pytest.fixture(params=["kvpr", "mdqa"])
def make(request: pytest.FixtureRequest, asked: tuple[Question, ...]) -> Callable[..., AbstractTask]:
    if request.param == "kvpr":
        return KeyValueRetrieval
    return lambda **options: MultiDocumentQA(asked, **options)


def test_a_prompt_of_kvpr():
    sample = KeyValueRetrieval(items=4, seed=3).sample(0)
    head, data, end = sample.prompt.split("\n\n")
    assert head == "Extract the value corresponding to the specified key in the JSON object below."
    pairs = list(json.loads(data.removeprefix("JSON data:\n")).items())
    assert len(pairs) == 4
    assert end == f'Key: "{pairs[sample.position][0]}"\nCorresponding value:'
    assert pairs[sample.position][1] == sample.answer
    for text in (text for pair in pairs for text in pair):
        assert len(text) == 36 and text[14] == "4" and text[19] in "89ab"


def test_a_prompt_of_mdqa(asked: tuple[Question, ...]):
    sample = MultiDocumentQA(asked, items=3, seed=1).sample(5)
    head, documents, end = sample.prompt.split("\n\n")
    assert head == (
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant)."
    )
    gold = next(question for question in asked if question.answers == (sample.answer,))
    assert end == f"Question: {gold.text}\nAnswer:"
    lines = documents.split("\n")
    assert lines[sample.position] == f"Document [{sample.position + 1}](Title: {gold.title}) {gold.passage}"
    assert [line[: line.index("(")] for line in lines] == ["Document [1]", "Document [2]", "Document [3]"]
    assert len(set(lines)) == 3
    assert [sample.answer in line for line in lines].count(True) == 1


def test_a_sample_is_the_same_one_however_many_are_drawn(make: Callable[..., AbstractTask]):
    forward = [make(items=4, seed=2).sample(index) for index in range(12)]
    task = make(items=4, seed=2)
    assert [task.sample(index) for index in reversed(range(12))] == forward[::-1]
    assert len({sample.prompt for sample in forward}) == 12
    others = [make(items=4, seed=3).sample(index) for index in range(12)]
    assert all(one.prompt != other.prompt for one, other in zip(forward, others, strict=True))


def test_every_position_comes_once_in_a_block(make: Callable[..., AbstractTask]):
    task = make(items=13)
    assert task.positions == (0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12)
    samples = [task.sample(index) for index in range(33)]
    assert Counter(sample.position for sample in samples) == dict.fromkeys(task.positions, 3)
    assert all(task.positions[sample.label] == sample.position for sample in samples)
    assert {sample.label for sample in samples[:11]} == set(range(11))
    blocks = [[sample.label for sample in samples[start : start + 11]] for start in (0, 11, 22)]
    assert blocks[0] != blocks[1] != blocks[2]


@pytest.mark.parametrize(
    ("items", "classes", "positions"),
    [
        (2, None, (0, 1)),
        (5, None, (0, 1, 2, 3, 4)),
        (75, None, (0, 7, 15, 22, 30, 37, 44, 52, 59, 67, 74)),
        (36, 2, (0, 35)),
        (13, 13, tuple(range(13))),
    ],
)
def test_tested_positions(items: int, classes: int | None, positions: tuple[int, ...]):
    assert KeyValueRetrieval(items=items, classes=classes).positions == positions


def test_crossed_contexts_differ_in_the_gold_position_alone(make: Callable[..., AbstractTask]):
    task = make(items=4, crossed=True)
    samples = [task.sample(index) for index in range(8)]
    for block in (samples[:4], samples[4:]):
        assert len({sample.context for sample in block}) == len({sample.answer for sample in block}) == 1
        assert {sample.position for sample in block} == {0, 1, 2, 3}
        lines = [sorted(line[line.find(")") :].strip("{} ,") for line in sample.prompt.split("\n")) for sample in block]
        assert all(other == lines[0] for other in lines)
    assert samples[0].context != samples[4].context


def test_all_questions_are_asked_equally_often_and_share_contexts(asked: tuple[Question, ...]):
    task = MultiDocumentQA(asked, items=3)
    samples = [task.sample(index) for index in range(3 * len(asked))]
    assert set(Counter(sample.answer for sample in samples).values()) == {3}
    assert len({(sample.answer, sample.context) for sample in samples}) == len(asked)


def test_questions_with_one_gold_passage_are_one_context(asked: tuple[Question, ...]):
    first = asked[0]
    again = Question("who built the mill of Orrin", ("Tessa Vale",), first.title, first.passage)
    task = MultiDocumentQA((*asked, again), items=3)
    samples = [task.sample(index) for index in range(len(asked) + 1)]
    contexts = [sample.context for sample in samples if sample.answer in ("Tessa Vale", *first.answers)]
    assert len(contexts) == 2
    assert len(set(contexts)) == 1


def test_no_distractor_holds_an_answer():
    """Nor in other letters: every second passage has the answer, in capitals and without the accent."""
    asked = (
        Question("who", ("Zoë Ågren",), "Gold", "It was Zoë Ågren."),
        *(Question("what", ("Ilex",), f"P{i}", f"Passage {i} {'of ZOE  AGREN' if i % 2 else ''}") for i in range(12)),
    )
    task = MultiDocumentQA(asked, items=7)
    index = next(index for index in range(13) if task.sample(index).answer == "Zoë Ågren")
    for attempt in range(5):
        assert normalise(task.sample(index, attempt).prompt).count("zoe agren") == 1
    with pytest.raises(OfflineError, match=r"expected 7 passages that do not answer 'who', found 6 among 13; .*--data"):
        MultiDocumentQA(asked, items=8).sample(index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": 1}, "expected 2 pairs or more to find one among, got 1"),
        ({"items": 4, "classes": 5}, "expected from 2 to 4 tested positions.*got 5"),
        ({"items": 4, "classes": 1}, "expected from 2 to 4 tested positions.*got 1"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(OfflineError, match=message):
        KeyValueRetrieval(**options)
