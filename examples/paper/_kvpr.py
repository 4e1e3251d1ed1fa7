"""Key-value pairs to learn retrieval from, drawn on the device, and how well a model retrieves."""

from dataclasses import dataclass
from typing import Any

import torch
from _corpus import END
from torch import Tensor
from torch.nn import Module

from repflow.monitor.offline.tasks_kvpr import PROMPT, KeyValueRetrieval

EVALUATION_SEED = 1_000_003
"""Of the samples that retrieval is judged by; `repflow reproduce` draws its own, from small seeds."""
_REST = 0.1
"""Weight in the loss of tokens that no model can foretell, or any can; what can be retrieved has 1."""


@dataclass(frozen=True)
class Rows:
    """Rows of tokens: the `weight` of each in the loss, whether it is of an `answer`, and whether it is no padding."""

    tokens: Tensor
    weight: Tensor
    answer: Tensor
    real: Tensor


class PairWriter:
    """Writes the prompts of `KeyValueRetrieval` as tokens, vectorised, with more than one question each.

    A sample is the prompt with its answer right behind the colon; then further keys of the same object are asked for,
    as many as fit. The keys are drawn anew for every sample, so that none is seen twice.

    Args:
        tokenizer: of `train_tokenizer`: what stands between UUIDs has the same tokens whatever these are.
        device: where samples are drawn.
        seed: of the draws.
    """

    def __init__(self, tokenizer: Any, device: torch.device, seed: int) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        head, between, tail = PROMPT.format(pairs="\0", key="\0").split("\0")
        texts = {
            "open": head + '"', "colon": '": "', "comma": '",\n "', "close": '"' + between, "tail": tail,
            "again": '\n\nKey: "', "dash": "-", "end": END,
        }  # fmt: skip

        def encode(text: str) -> Tensor:
            return torch.tensor(tokenizer.encode(text), device=device)

        self._places: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._literal = {name: encode(text) for name, text in texts.items()}
        self._dash, self._end = int(self._literal["dash"]), int(self._literal["end"])
        zero = "00000000-0000-4000-8000-0000000000"  # and a last byte, which comes last
        self._byte = torch.stack([encode(f"{zero}{byte:02x}")[-1] for byte in range(256)])
        self._uuid_tokens = len(encode(zero + "00"))

    def questions(self, pairs: int, tokens: int) -> int:
        """How many of `pairs` keys are asked for so that a sample has `tokens` tokens at most; 0: not even one."""
        none, one = self._length(pairs, 0), self._length(pairs, 1)
        return max(0, min(pairs, (tokens - none) // (one - none)))

    def _length(self, pairs: int, questions: int) -> int:
        """Tokens of a sample."""
        size = {name: len(value) for name, value in self._literal.items()}
        listed = size["open"] + pairs * (2 * self._uuid_tokens + size["colon"] + size["comma"]) - size["comma"]
        asked = questions * (2 * self._uuid_tokens + size["again"] + size["tail"]) - size["again"]
        return listed + size["close"] + asked + size["end"]

    def rows(self, count: int, tokens: int, pairs: int) -> Rows:
        """`[count, tokens]`: as many samples in a row as fit, padded with the end token."""
        questions = self.questions(pairs, tokens)
        if not questions:
            raise ValueError(f"expected room for {pairs} pairs and a question in {tokens} tokens; take fewer pairs")
        length = self._length(pairs, questions)
        each = tokens // length
        sample, weight, answer = self._samples(count * each, pairs, questions)
        shape, filled = (count, tokens), each * length
        row = torch.full(shape, self._end, device=self._device)
        weights, answers = torch.zeros(shape, device=self._device), torch.zeros_like(row, dtype=torch.bool)
        row[:, :filled], weights[:, :filled] = sample.view(count, filled), weight.repeat(each)
        answers[:, :filled] = answer.repeat(each)
        real = (torch.arange(tokens, device=self._device) < filled).expand(shape)
        return Rows(row, weights, answers, real)

    def _samples(self, count: int, pairs: int, questions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[count, length]`, and weights and places of answers `[length]`, which all samples share."""
        uuids = self._uuids(count, pairs)
        order = torch.rand(count, pairs, device=self._device, generator=self._generator).argsort(1)
        parts: list[tuple[Tensor, str]] = []

        def literal(name: str) -> None:
            parts.append((self._literal[name].expand(count, -1), "rest"))

        for pair in range(pairs):
            literal("comma" if pair else "open")
            parts.append((uuids[:, pair, 0], "rest"))
            literal("colon")
            parts.append((uuids[:, pair, 1], "rest"))
        every = torch.arange(count, device=self._device)
        for question in range(questions):
            literal("again" if question else "close")
            asked = uuids[every, order[:, question]]
            parts.append((asked[:, 0], "key"))
            literal("tail")
            parts.append((asked[:, 1], "answer"))
        literal("end")
        if (pairs, questions) not in self._places:  # a copy to the device waits for it: one for each kind of sample
            sizes = torch.tensor([part.shape[1] for part, _ in parts])
            weight = torch.tensor([_REST if kind == "rest" else 1.0 for _, kind in parts]).repeat_interleave(sizes)
            answer = torch.tensor([kind == "answer" for _, kind in parts]).repeat_interleave(sizes)
            self._places[pairs, questions] = weight.to(self._device), answer.to(self._device)
        return torch.cat([part for part, _ in parts], 1), *self._places[pairs, questions]

    def _uuids(self, count: int, pairs: int) -> Tensor:
        """`[count, pairs, 2, tokens of a UUID]`: of version 4, as `uuid.uuid4` draws them."""
        value = torch.randint(256, (count, pairs, 2, 16), device=self._device, generator=self._generator)
        value[..., 6] = value[..., 6] % 16 + 0x40
        value[..., 8] = value[..., 8] % 64 + 0x80
        digits = self._byte[value]
        dash = torch.full_like(digits[..., :1], self._dash)
        groups = digits.split([4, 2, 2, 2, 6], -1)
        return torch.cat([groups[0], *(part for group in groups[1:] for part in (dash, group))], -1)


@dataclass(frozen=True)
class Retrieval:
    """How a model does on samples with so many pairs."""

    pairs: int
    prompt_tokens: int
    first: float
    """Share of the samples whose first token of the answer is the likeliest one: 1 / pairs is chance."""
    whole: float
    """Share of the samples whose answer is retrieved whole, each token the likeliest one after those before it."""


@torch.no_grad()
def judge_retrieval(
    model: Module, tokenizer: Any, pairs: int, samples: int, device: torch.device, batch: int = 64
) -> Retrieval:
    """Greedy decoding against the answers of `KeyValueRetrieval`.

    Each token is judged behind the true ones before it: those that are right up to the first error are the ones that
    greedy decoding gives, so that the share of whole answers is that of decoding.
    """
    task = KeyValueRetrieval(items=pairs, seed=EVALUATION_SEED)
    drawn = [task.sample(index) for index in range(samples)]
    prompts, answers = (
        torch.tensor([tokenizer.encode(text) for text in texts], device=device)
        for texts in ([sample.prompt for sample in drawn], [sample.answer for sample in drawn])
    )
    right: list[Tensor] = []
    for prompt, answer in zip(prompts.split(batch), answers.split(batch), strict=True):
        logits = model(input_ids=torch.cat([prompt, answer], 1)[:, :-1], use_cache=False).logits
        right.append(logits[:, prompt.shape[1] - 1 :].argmax(-1) == answer)
    hits = torch.cat(right)
    first, whole = hits[:, 0].double().mean(), hits.all(1).double().mean()
    return Retrieval(pairs, prompts.shape[1], float(first), float(whole))
