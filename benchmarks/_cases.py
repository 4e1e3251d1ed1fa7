"""What is measured: shapes, dtypes and inputs that look like a residual stream."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _offset(states: Tensor) -> None:
    states[..., :2] += 100 * float(states[0].float().std())


def _large_feature(states: Tensor) -> None:
    states[..., -1] *= 1000


def _sink(states: Tensor) -> None:
    states[:, :, 0, :2] = 1000


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "offset of 100σ": _offset,
    "feature × 1000": _large_feature,
    "sink token": _sink,
}
"""What makes HSIC hard: a constant of 100 standard deviations on two features, one feature 1000 times the rest, and a
token of 1000 on two features, as attention sinks are."""


@dataclass(frozen=True)
class Case:
    """One input to measure all implementations on."""

    shape: tuple[int, int, int, int]
    """S states, B rows, T tokens, D features."""
    dtype: torch.dtype = torch.bfloat16
    input: str = "plain"
    """"plain", "masked", or one of `CHANGES`."""
    compiled: bool = False
    """Whether torch.compile is measured too; every shape is compiled anew, for seconds."""

    def make(self, seed: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """States `[S, B, T, D]` and a mask `[B, T]`, or None, drawn from `seed`.

        Tokens share a direction, as they do in language models, and each state is the one before and a smaller update.
        The mask pads row b on the right with b eighths of its tokens.
        """
        generator = torch.Generator(device).manual_seed(seed)
        num_states, rows, tokens, features = self.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        state = normal(rows, tokens, features) + normal(features)
        states = torch.empty(self.shape, dtype=self.dtype, device=device)
        for layer in range(num_states):
            states[layer] = state
            state += 0.3 * normal(rows, tokens, features)
        if self.input in CHANGES:
            CHANGES[self.input](states)
        if self.input != "masked":
            return states, None
        padded = tokens * torch.arange(rows, device=device).unsqueeze(1) // 8
        return states, torch.arange(tokens, device=device) < tokens - padded

    def columns(self) -> dict[str, object]:
        """What tells this case from the others in the results."""
        sizes = dict(zip("SBTD", self.shape, strict=True))
        return {**sizes, "dtype": str(self.dtype).removeprefix("torch."), "input": self.input}


DEPTH = [
    Case((33, 4, 2048, 2560), compiled=True),
    Case((65, 4, 2048, 2560)),
    Case((33, 4, 2048, 4096)),
    Case((13, 1, 512, 768), compiled=True),
    Case((33, 4, 2048, 2560), dtype=torch.float32),
    Case((33, 4, 2048, 2560), dtype=torch.float16),
    Case((33, 4, 2048, 2560), input="masked"),
]

HSIC = [
    Case((33, 1, 2048, 2560), compiled=True),
    Case((65, 1, 2048, 2560), compiled=True),
    Case((65, 1, 4096, 2560)),
    Case((33, 4, 2048, 2560)),
    Case((13, 1, 512, 768), compiled=True),
    Case((33, 1, 2048, 2560), dtype=torch.float32),
    *(Case((33, 1, 2048, 2560), input=name) for name in CHANGES),
]

SIMILARITY = [
    Case((1, 8, 2048, 2560)),
    Case((1, 4, 4096, 4096)),
    Case((1, 8, 2048, 1024)),
    Case((1, 8, 2048, 2560), dtype=torch.float32),
    Case((1, 8, 2048, 2560), dtype=torch.float16),
    Case((1, 8, 2048, 2560), input="masked"),
]

QUICK_DEPTH = [
    Case((4, 2, 16, 64), compiled=True),
    Case((3, 2, 8, 64), dtype=torch.float32),
    Case((3, 2, 8, 64), dtype=torch.float16, input="masked"),
]
"""Small enough for Triton's interpreter."""

QUICK_SIMILARITY = [Case((1, 2, 16, 64)), Case((1, 2, 16, 64), input="masked")]

QUICK_HSIC = [
    Case((3, 2, 16, 32), compiled=True),
    Case((2, 1, 16, 32), dtype=torch.float32),
    Case((2, 1, 130, 32), input="offset of 100σ"),
    Case((2, 1, 16, 32), input="feature × 1000"),
    Case((2, 1, 16, 32), input="sink token"),
]
"""Small enough for Triton's interpreter; 130 tokens take the kernels of long groups."""
