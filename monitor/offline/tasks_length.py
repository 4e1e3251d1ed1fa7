"""Prompts of a wanted length: how many items make n tokens of the tokenizer at hand, and the prompts as tokens."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int32, Int64

from repflow.monitor.offline import BeyondWindowError, OfflineError
from repflow.monitor.offline.tasks import AbstractTask

LENGTHS = ("300", "1K", "2K", "4K")
"""The lengths of the paper. 1K is 1,024 tokens."""
_SHARED_WINDOW = 2048
_PILOT = 64  # prompts whose lengths are looked at before the number of items is settled
_MAY_EXCEED = 0.2  # share of the prompts that may be too long at first, and are drawn again
_ATTEMPTS = 100
_ENCODED_AT_ONCE = 256
_MAY_BE_UNKNOWN = 0.01  # share of the tokens
TaskType = TypeVar("TaskType", bound=AbstractTask)


def parse_length(text: str) -> int:
    """Tokens of a length such as `300` or `2K`.

    Raises:
        OfflineError: it is none.
    """
    match = re.fullmatch(r"([1-9]\d*)([kK]?)", text.strip())
    if match is None:
        raise OfflineError(f"--length: expected a number of tokens, such as {', '.join(LENGTHS)}; got {text!r}")
    return int(match[1]) * (1024 if match[2] else 1)


@dataclass(frozen=True, eq=False)
class EncodedSamples:
    """Samples of one task as tokens, in the order of their numbers."""

    ids: list[Int32[np.ndarray, " _"]]
    labels: Int64[np.ndarray, " N"]
    positions: Int64[np.ndarray, " N"]
    """Of the gold items."""
    contexts: Int64[np.ndarray, " N"]
    attempts: Int64[np.ndarray, " N"]
    """How often a sample was drawn again, for it was longer than the window."""

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.ids)


class PromptEncoder:
    """Turns prompts into tokens that end with the prompt.

    Args:
        tokenizer: of transformers.
        vocabulary: tokens that the model knows; that of the tokenizer if None.

    Raises:
        OfflineError: the tokenizer has tokens that the model does not know.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if vocabulary is not None and largest >= vocabulary:
            raise OfflineError(
                f"{tokenizer.name_or_path}: expected a tokenizer of at most the {vocabulary} tokens that the model "
                f"knows, got one with the token {largest}; name the tokenizer that the model was trained with"
            )

    @property
    def limit(self) -> int | None:
        """Most tokens that the tokenizer says it is for; None if it does not say."""
        limit = self._tokenizer.model_max_length
        return limit if limit < 10**9 else None

    @property
    def name(self) -> str:
        """Where the tokenizer comes from."""
        return str(self._tokenizer.name_or_path)

    def __call__(self, prompts: list[str]) -> list[Int32[np.ndarray, " _"]]:
        """Tokens of each prompt, with what the tokenizer puts in front, without what it puts behind."""
        rows = self._tokenizer(prompts, truncation=False, padding=False, verbose=False)["input_ids"]
        for row in rows:
            while row and row[-1] in self._special:
                row.pop()
        return [np.asarray(row, dtype=np.int32) for row in rows]

    def check(self, rows: list[Int32[np.ndarray, " _"]]) -> None:
        """Raise an OfflineError where too many tokens are unknown: then prompts differ, and their tokens do not."""
        unknown = self._tokenizer.unk_token_id
        tokens = np.concatenate(rows)
        share = 0.0 if unknown is None else float((tokens == unknown).mean()) if len(tokens) else 1.0
        if share > _MAY_BE_UNKNOWN:
            raise OfflineError(
                f"{self.name}: expected a tokenizer that can spell the prompts, got one that knows no token for "
                f"{share:.0%} of them; name the tokenizer that the model was trained with"
            )


def fit_items(
    make: Callable[[int], TaskType], tokens: int, encoder: PromptEncoder, window: int | None = None
) -> TaskType:
    """The task whose prompts have `tokens` tokens, as nearly as a whole number of items allows.

    No more than 20 % of its prompts may be longer than the window. This is the model's own, and at most the next power
    of two, from 2,048 up, that holds `tokens`, so that models with larger windows, or without one, get the same
    prompts.

    Args:
        make: from a number of items to the task.
        tokens: the length that is wanted.
        encoder: of the tokenizer at hand.
        window: most tokens that the model was made for; None if there is no such number.

    Raises:
        BeyondWindowError: `tokens` is more than the window, or not even two items fit.
        OfflineError: the tokenizer is not for so many tokens, or cannot spell the prompts.
    """
    limit = shared_window(tokens, window)
    if encoder.limit is not None and encoder.limit < tokens:
        raise OfflineError(
            f"{encoder.name}: expected a tokenizer for {tokens:,} tokens, got one for {encoder.limit:,} "
            "(model_max_length); name another, or ask for a smaller length"
        )

    @functools.cache
    def lengths(items: int) -> Int64[np.ndarray, " pilot"]:
        task = make(items)
        rows = encoder([task.sample(index).prompt for index in range(_PILOT)])
        encoder.check(rows)
        return np.array([len(row) for row in rows])

    def misses(items: int) -> float:
        return abs(float(lengths(items).mean()) - tokens)

    def too_long(items: int) -> bool:
        return float((lengths(items) > limit).mean()) > _MAY_EXCEED

    few, some = (float(lengths(items).mean()) for items in (2, 3))
    items = max(2, 2 + round((tokens - few) / max(some - few, 1.0)))
    while misses(items + 1) < misses(items):
        items += 1
    while items > 2 and (misses(items - 1) < misses(items) or too_long(items)):
        items -= 1
    task = make(items)
    if too_long(items):
        larger = window is None or window > limit
        remedy = "ask for a larger length" if larger else "take another task, or a model with a larger window"
        raise BeyondWindowError(
            f"skipped {tokens:,} tokens of {task.name}: expected 2 {task.unit} to fit into {limit:,}"
            f"{'' if larger else ', the window of the model'}, got prompts of {int(lengths(items).mean()):,}; {remedy}"
        )
    return task


def shared_window(tokens: int, window: int | None) -> int:
    """Most tokens that a prompt of about `tokens` may have.

    Raises:
        BeyondWindowError: `tokens` is more than the window.
    """
    if window is not None and tokens > window:
        raise BeyondWindowError(f"skipped {tokens:,} tokens: the model's window is {window:,}")
    shared = _SHARED_WINDOW
    while shared < tokens:
        shared *= 2
    return shared if window is None else min(shared, window)


def encode_samples(task: AbstractTask, count: int, encoder: PromptEncoder, limit: int) -> EncodedSamples:
    """The first `count` samples as tokens; one that is longer than `limit` tokens is drawn again.

    Raises:
        OfflineError: a sample is too long however often it is drawn.
    """
    ids: list[Any] = []
    numbers: list[tuple[int, int, int, int]] = []
    for start in range(0, count, _ENCODED_AT_ONCE):
        part = [task.sample(index) for index in range(start, min(count, start + _ENCODED_AT_ONCE))]
        for offset, row in enumerate(encoder([sample.prompt for sample in part])):
            sample, attempt = part[offset], 0
            while len(row) > limit:
                attempt += 1
                if attempt == _ATTEMPTS:
                    raise OfflineError(
                        f"{task.name}: expected prompts of at most {limit:,} tokens with {task.items} {task.unit}, got "
                        f"a longer one for sample {start + offset} in {_ATTEMPTS} attempts; ask for fewer {task.unit}"
                    )
                sample = task.sample(start + offset, attempt)
                (row,) = encoder([sample.prompt])
            ids.append(row)
            numbers.append((sample.label, sample.position, sample.context, attempt))
    return EncodedSamples(ids, *np.array(numbers, dtype=np.int64).reshape(-1, 4).T)
