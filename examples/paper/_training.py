"""The training loop: text and key-value pairs in every batch, limited by time or by steps, watched by the monitor."""

import csv
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from _corpus import Corpus
from _kvpr import PairWriter, Rows
from _variants import TOKENS
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from repflow.monitor import Monitor

CURRICULUM = ((0.15, 2), (0.3, 4), (1.0, 9))
"""Until which share of the training a sample has how many pairs at most."""
WARM_UP, LAST_RATE = 0.04, 0.02
"""Share of the training over which the learning rate rises, and what is left of it at the end of a cosine."""
EVERY = 10
"""Steps that a row of the curve is the mean of."""
_SAID_EVERY = 100


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row of the curve."""

    step: int
    seconds: float
    """Since the end of the first step, which compiles."""
    text_loss: float
    """Nats per token."""
    answer_loss: float
    """Nats per token of the answers of KVPR."""
    answer_accuracy: float
    """Share of these tokens that are the likeliest ones."""
    pairs: int
    """Most pairs of a sample."""
    learning_rate: float


@dataclass
class Clock:
    """How much of the training is done, by steps or by time.

    The time begins when the first step has ended, so that what compiling takes is not taken from the training.
    """

    steps: int | None
    seconds: float | None
    done: int = 0
    began: float = field(default_factory=time.perf_counter)

    def share(self) -> float:
        """From 0 to 1."""
        if self.steps is not None:
            return self.done / self.steps
        assert self.seconds is not None
        return min(1.0, self.elapsed() / self.seconds) if self.done else 0.0

    def elapsed(self) -> float:
        """Seconds since the first step has ended."""
        return time.perf_counter() - self.began if self.done else 0.0

    def tick(self, device: torch.device) -> None:
        """A step has ended."""
        if self.done == 0:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.began = time.perf_counter()
        self.done += 1


@dataclass(frozen=True)
class Batches:
    """Rows of `TOKENS` + 1 tokens, half of them text and half key-value pairs."""

    text: Tensor
    writer: PairWriter
    rows: int
    fitting: int
    """Most pairs of a sample that fit into a row with a question."""
    generator: torch.Generator
    choice: random.Random

    @classmethod
    def of(cls, corpus: Corpus, rows: int, device: torch.device, seed: int) -> "Batches":
        """Those of a corpus, on a device."""
        writer = PairWriter(corpus.tokenizer, device, seed)
        fitting = next(pairs for pairs in range(CURRICULUM[-1][1], 0, -1) if writer.questions(pairs, TOKENS + 1))
        generator = torch.Generator(device).manual_seed(seed)
        return cls(corpus.train.to(device), writer, rows, fitting, generator, random.Random(seed))

    def draw(self, most_pairs: int) -> Rows:
        """A batch, whose samples of KVPR have so many pairs at most."""
        half, device = self.rows // 2, self.text.device
        start = torch.randint(len(self.text) - TOKENS, (half, 1), device=device, generator=self.generator)
        text = self.text[start + torch.arange(TOKENS + 1, device=device)].long()
        count = self.choice.randint(1, min(most_pairs, self.fitting))
        pairs = self.writer.rows(self.rows - half, TOKENS + 1, count)
        ones = torch.ones(text.shape, device=device)
        return Rows(
            torch.cat([text, pairs.tokens]),
            torch.cat([ones, pairs.weight]),
            torch.cat([ones < 0, pairs.answer]),
            torch.cat([ones > 0, pairs.real]),
        )


def losses(model: Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """What is minimised, and three numbers to look at: loss of text, loss of answers, share of right answer tokens."""
    half = len(rows.tokens) // 2
    targets = rows.tokens[:, 1:]
    logits = model(input_ids=rows.tokens[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
    weight, answer = rows.weight[half:, 1:], rows.answer[half:, 1:]
    text, pairs = loss[:half].mean(), (loss[half:] * weight).sum() / weight.sum()
    with torch.no_grad():
        right = logits[half:].argmax(-1) == targets[half:]
        count = answer.sum()
        seen = torch.stack([text, (loss[half:] * answer).sum() / count, (right & answer).sum() / count])
    return text + pairs, seen


def optimizer_of(model: Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=trained[0].is_cuda)


def rate_factor(share: float) -> float:
    """Of the learning rate: up a line, down a cosine."""
    cosine = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share))
    return min(1.0, (share + 1e-3) / WARM_UP) * cosine


def train(
    model: Module, batches: Batches, monitor: Monitor, clock: Clock, learning_rate: float, say: Callable[[str], None]
) -> list[Point]:
    """Train until the clock has run out; the curve.

    Raises:
        SystemExit: the loss is no longer finite.
    """
    optimizer = optimizer_of(model, learning_rate)
    device = batches.text.device
    kept: list[tuple[Tensor, dict[str, Any]]] = []
    window: list[Tensor] = []
    while (share := clock.share()) < 1:
        pairs = next(most for until, most in CURRICULUM if share < until)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_factor(share)
        rows = batches.draw(pairs)
        precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with monitor.step(clock.done, mask=rows.real[:, :-1]), precision:
            loss, seen = losses(model, rows)
            loss.backward()
        monitor.log(loss=loss, text_loss=seen[0], answer_loss=seen[1], answer_accuracy=seen[2])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window.append(seen)
        clock.tick(device)
        if clock.done % EVERY == 0:
            rate = optimizer.param_groups[0]["lr"]
            about = {"step": clock.done, "seconds": clock.elapsed(), "pairs": pairs, "learning_rate": rate}
            kept.append((torch.stack(window).mean(0), about))  # on the device: nothing is waited for
            window = []
        if clock.done % _SAID_EVERY == 0:
            _say(kept[-1], clock, say)
    return [_point(*entry) for entry in kept]


def _say(entry: tuple[Tensor, dict[str, Any]], clock: Clock, say: Callable[[str], None]) -> None:
    point = _point(*entry)
    if not math.isfinite(point.text_loss + point.answer_loss):
        raise SystemExit(f"the loss is not finite at step {point.step}; take a lower --learning-rate")
    say(
        f"{clock.share():4.0%}  step {point.step}, {clock.done / max(clock.elapsed(), 1e-9):.1f} steps/s: text "
        f"{point.text_loss:.3f}, answers {point.answer_loss:.3f} ({point.answer_accuracy:.0%} right)"
    )


def _point(seen: Tensor, about: dict[str, Any]) -> Point:
    text, answer, accuracy = seen.tolist()
    return Point(text_loss=text, answer_loss=answer, answer_accuracy=accuracy, **about)


def write_curve(path: Path, curve: list[Point]) -> None:
    """The curve as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: round(value, 6) for name, value in asdict(point).items()} for point in curve)
