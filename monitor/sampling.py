"""Which steps, sequences and tokens are measured: a function of step and seed, never of the user's random state."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Every n-th optimizer step, counted from step 0."""

    every_n_steps: int

    def __call__(self, step: int) -> bool:
        """Whether `step` is measured."""
        return step % self.every_n_steps == 0


@dataclass(frozen=True, eq=False)
class Selection:
    """The part of a batch `[B, T]` that is measured: some rows, and the same number of tokens of each.

    `None` stands for all of them, in order, so that nothing needs to be gathered.
    """

    rows: Int64[Tensor, " R"] | None
    """Chosen rows, sorted."""
    tokens: Int64[Tensor, " K"] | None
    """Chosen positions, sorted, the same in each row and at every layer."""
    shape: tuple[int, int]
    """(R, K)."""

    def take(self, values: Shaped[Tensor, "B T *rest"]) -> Shaped[Tensor, "R K *rest"]:
        """The chosen part of `values`; a view of it where everything is chosen."""
        if self.rows is not None:
            values = values.index_select(0, self.rows)
        if self.tokens is not None:
            values = values.index_select(1, self.tokens)
        return values

    def to(self, device: torch.device) -> "Selection":
        """The same on `device`. The copy does not wait for the device."""
        rows, tokens = (_send(index, device) for index in (self.rows, self.tokens))
        return Selection(rows, tokens, self.shape)


def select(batch: tuple[int, int], max_tokens: int, *, seed: int, step: int, forward: int) -> Selection:
    """Choose at most `max_tokens` tokens of a batch of `(B, T)`.

    Whole sequences first. A single sequence above the budget keeps a sorted uniform sample of its tokens: a contiguous
    chunk would bias the mean over pairs (Eq. 2) towards neighbours.

    Args:
        batch: rows and tokens of the batch.
        max_tokens: the budget, at least 1.
        seed: of the run.
        step: optimizer step.
        forward: number of the micro-batch within the step.
    """
    rows, tokens = batch
    keep = min(rows, max(1, max_tokens // max(tokens, 1)))
    generator = torch.Generator("cpu").manual_seed(_mix(seed, step, forward))

    def draw(number: int, of: int) -> Tensor:
        # The device is named, since the user may have set another default.
        return torch.randperm(of, generator=generator, device="cpu")[:number].sort().values

    chosen = None if keep == rows else draw(keep, rows)
    if tokens <= max_tokens:
        return Selection(chosen, None, (keep, tokens))
    return Selection(chosen, draw(max_tokens, tokens), (keep, max_tokens))


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, the same on every platform."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _send(index: Tensor | None, device: torch.device) -> Tensor | None:
    if index is None or device.type != "cuda":
        return index if index is None else index.to(device)
    return index.pin_memory().to(device, non_blocking=True)
