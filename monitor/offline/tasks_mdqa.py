"""Multi-document question answering (MDQA): one passage answers the question, the others do not."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.tasks import AbstractTask, generator

PROMPT = """Write a high-quality answer for the given question using only the provided search results \
(some of which might be irrelevant).

{documents}

Question: {question}
Answer:"""


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the passage that answers it."""

    text: str
    answers: tuple[str, ...]
    title: str
    passage: str


@dataclass(frozen=True)
class MultiDocumentQA(AbstractTask):
    """m passages, one of which answers the question (appendix B).

    The others are the gold passages of other questions that do not contain an answer, in random order. All questions
    are asked equally often. Questions with the same gold passage are one context.
    """

    name: ClassVar[str] = "mdqa"
    unit: ClassVar[str] = "documents"

    questions: Sequence[Question] = field(repr=False)

    def describe(self) -> dict[str, Any]:
        """Every choice, as plain values."""
        return super().describe() | {
            "questions": len(self.questions),
            "distractors": "gold passages of other questions without an answer to this one",
        }

    @cached_property
    def _passages(self) -> dict[str, int]:
        """Distinct gold passages, and the first question of each."""
        first: dict[str, int] = {}
        for index, question in enumerate(self.questions):
            first.setdefault(question.passage, index)
        return first

    @cached_property
    def _normalised(self) -> list[str]:
        """Of each question, the gold passage with its title."""
        return [normalise(f"{question.title} {question.passage}") for question in self.questions]

    def _compose(self, context: int, position: int, attempt: int) -> tuple[str, str, int]:
        turn, place = divmod(context, len(self.questions))
        asked = self._order(turn)[place]
        question = self.questions[asked]
        documents = [self.questions[index] for index in self._distractors(asked, context, attempt)]
        documents.insert(position, question)
        lines = "\n".join(
            f"Document [{number}](Title: {document.title}) {document.passage}"
            for number, document in enumerate(documents, start=1)
        )
        prompt = PROMPT.format(documents=lines, question=question.text)
        return prompt, question.answers[0], self._passages[question.passage]

    def _order(self, turn: int) -> list[int]:
        """In which order the questions are asked for the `turn`-th time."""
        if turn not in self._orders:
            order = list(range(len(self.questions)))
            generator(self.name, "questions", self.seed, turn).shuffle(order)
            self._orders[turn] = order
        return self._orders[turn]

    @cached_property
    def _orders(self) -> dict[int, list[int]]:
        return {}

    def _distractors(self, asked: int, context: int, attempt: int) -> list[int]:
        """Questions whose passages stand beside the gold one, each passage once."""
        question, draw = self.questions[asked], generator(self.name, self.seed, context, attempt)
        answers = [answer for answer in map(normalise, question.answers) if answer]
        candidates = list(self._passages.values())
        chosen: list[int] = []
        # Drawn one by one, as a shuffle of all would be, of which only the beginning is needed.
        for end in range(len(candidates) - 1, -1, -1):
            if len(chosen) == self.items - 1:
                return chosen
            at = draw.randrange(end + 1)
            candidates[at], candidates[end] = candidates[end], candidates[at]
            other = candidates[end]
            if self.questions[other].passage == question.passage:
                continue
            if not any(answer in self._normalised[other] for answer in answers):
                chosen.append(other)
        if len(chosen) < self.items - 1:
            raise OfflineError(
                f"mdqa: expected {self.items - 1} passages that do not answer {question.text!r}, found {len(chosen)} "
                f"among {len(candidates)}; ask for fewer documents, or pass a larger file with --data"
            )
        return chosen


def normalise(text: str) -> str:
    """`text` as it is searched for answers: without case and accents, and with single spaces."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(letter for letter in plain if not unicodedata.combining(letter)).split())
