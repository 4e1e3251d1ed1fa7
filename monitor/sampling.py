"""Which steps, sequences and tokens are measured: a function of step and seed, never of the user's random state."""

import hashlib
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

_FEW_ROWS = 16


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

    `None` stands for all of them, in order, so that nothing needs to be gathered. Tokens are chosen of a single row.
    """

    rows: Int64[Tensor, " R"] | slice | None
    """Chosen rows, sorted; a slice where they lie at even distances, as one or two rows always do."""
    tokens: Int64[Tensor, " K"] | None
    """Chosen positions, sorted, the same at every layer."""
    shape: tuple[int, int]
    """(R, K)."""
    numbers: tuple[int, ...] | None = None
    """`rows` on the host, where they are few enough to be named one by one: `index_select` of a few long rows is far
    from the speed of a GPU's memory."""

    def take(self, values: Shaped[Tensor, "..."], dim: int = 0) -> Shaped[Tensor, "..."]:
        """The chosen part of `values`, whose dimensions `dim` and `dim` + 1 are rows and tokens.

        A view of it where nothing is to be gathered, and contiguous otherwise.
        """
        if isinstance(self.rows, slice):
            values = values[(slice(None),) * dim + (self.rows,)]
        elif self.rows is not None:
            values = values.index_select(dim, self.rows)
        return values if self.tokens is None else values.index_select(dim + 1, self.tokens)

    def positions(self, batch: tuple[int, int], device: torch.device) -> Int64[Tensor, "R K"] | None:
        """The chosen tokens as positions in the flattened batch `(B, T)`; None where `take` gives a view."""
        if self.tokens is None and not isinstance(self.rows, Tensor):
            return None
        return self.take(torch.arange(batch[0] * batch[1], device=device).view(batch))

    def copy_into(self, target: Shaped[Tensor, "R K *rest"], values: Shaped[Tensor, "B T *rest"]) -> None:
        """`target.copy_(self.take(values))`, in one go where dtype and device are the same."""
        index, dim = (self.rows, 0) if isinstance(self.rows, Tensor) else (self.tokens, 1)
        if index is None or (values.dtype, values.device) != (target.dtype, target.device):
            target.copy_(self.take(values), non_blocking=True)
        elif self.numbers is not None:
            torch.cat([values.narrow(0, number, 1) for number in self.numbers], out=target)
        else:
            rows = values[self.rows] if isinstance(self.rows, slice) else values
            torch.index_select(rows, dim, index, out=target)

    def to(self, device: torch.device) -> "Selection":
        """The same on `device`. The copy does not wait for the device."""
        rows = send_index(self.rows, device) if isinstance(self.rows, Tensor) else self.rows
        tokens = None if self.tokens is None else send_index(self.tokens, device)
        return replace(self, rows=rows, tokens=tokens)


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
    chosen = None if keep == rows else _as_slice(_draw(keep, rows, generator))
    if tokens <= max_tokens:
        few = tuple(chosen.tolist()) if isinstance(chosen, Tensor) and keep <= _FEW_ROWS else None
        return Selection(chosen, None, (keep, tokens), few)
    return Selection(chosen, _draw(max_tokens, tokens, generator), (keep, max_tokens))


def _draw(number: int, of: int, generator: torch.Generator) -> Int64[Tensor, " number"]:
    # The device is named, since the user may have set another default.
    return torch.randperm(of, generator=generator, device="cpu")[:number].sort().values


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, the same on every platform."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _as_slice(index: Int64[Tensor, " R"]) -> Int64[Tensor, " R"] | slice:
    """The slice that names the same rows, if there is one: a view instead of a copy."""
    numbers = index.tolist()
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    even = range(numbers[0], numbers[-1] + 1, step)
    return slice(even.start, even.stop, step) if numbers == list(even) else index


def send_index(index: Int64[Tensor, " K"], device: torch.device) -> Int64[Tensor, " K"]:
    """`index`, which is on the CPU, on `device`; a GPU is not waited for."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)
