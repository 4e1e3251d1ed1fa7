"""Token states that the statistics must stand: every dtype, mask, odd size, memory layout and fault."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def mask_none(rows: int, tokens: int) -> None:
    return None


def mask_right(rows: int, tokens: int) -> Tensor:
    """Row r misses its last r tokens."""
    return torch.arange(tokens).expand(rows, -1) < tokens - torch.arange(rows).unsqueeze(1)


def mask_left(rows: int, tokens: int) -> Tensor:
    return mask_right(rows, tokens).flip(1).long()


def mask_holes(rows: int, tokens: int) -> Tensor:
    return (torch.arange(rows * tokens).view(rows, tokens) % 3 != 1).to(torch.int32)


def mask_empty_row(rows: int, tokens: int) -> Tensor:
    mask = mask_right(rows, tokens).long()
    mask[rows // 2] = 0
    return mask


def mask_documents(rows: int, tokens: int) -> Tensor:
    """Row r starts with r tokens of padding; then documents of 5 tokens."""
    start = torch.arange(rows).unsqueeze(1)
    position = torch.arange(tokens).expand(rows, -1)
    return torch.where(position < start, 0, (position - start) // 5 + 1)


def mask_missing_document(rows: int, tokens: int) -> Tensor:
    """Documents 1 and 4 of every row but the last, which has none; 2 and 3 do not occur, and 1 comes back after 4."""
    mask = torch.where(torch.arange(tokens).expand(rows, -1) % 7 < 4, 1, 4).to(torch.int8)
    mask[-1] = 0
    return mask


def mask_as_many_documents_as_rows(rows: int, tokens: int) -> Tensor:
    """All documents are in the first row, the other rows are padding: as many groups as rows, but not one per row."""
    mask = torch.zeros(rows, tokens, dtype=torch.int64)
    mask[0] = torch.arange(tokens) * rows // max(tokens, 1) + 1
    return mask


def no_fault(states: Tensor) -> None:
    return


def fault_zero_vectors(states: Tensor) -> None:
    states[1, :, 1::4] = 0
    states[0, 0, 0] = 0


def fault_equal_tokens(states: Tensor) -> None:
    states[1] = states[1, :1, :1].clone()


def fault_equal_states(states: Tensor) -> None:
    states[:] = states[:1].clone()


def fault_nan_feature(states: Tensor) -> None:
    states[1, 0, 3, 0] = torch.nan


def fault_inf_feature(states: Tensor) -> None:
    states[0, 1, 0, -1] = torch.inf
    states[-1, 1, 4, 0] = -torch.inf


def fault_opposite_infinities(states: Tensor) -> None:
    """Differences of infinities are NaN, their sums may be anything."""
    states[0, 0, 2, 0], states[1, 0, 2, 0], states[2, 0, 2, 0] = torch.inf, -torch.inf, torch.inf


def fault_nan_state(states: Tensor) -> None:
    states[1] = torch.nan


def fault_nan_state_of_one_row(states: Tensor) -> None:
    states[2, 0] = torch.nan


def fault_nan_row(states: Tensor) -> None:
    states[:, 1] = torch.nan


def fault_huge(states: Tensor) -> None:
    states *= 1e30


def fault_tiny(states: Tensor) -> None:
    states *= 1e-30


def fault_scales_apart(states: Tensor) -> None:
    states[0] *= 1e15
    states[-1] *= 1e-15


def fault_offset(states: Tensor) -> None:
    """A constant of 100 standard deviations on two features, as massive activations are."""
    states[..., :2] += 100 * states.std()


def fault_one_feature(states: Tensor) -> None:
    states[..., -1] *= 1000


def fault_sink(states: Tensor) -> None:
    states[:, :, 0, :2] = 1000


FAULTS: tuple[Callable[[Tensor], None], ...] = (
    fault_zero_vectors,
    fault_equal_tokens,
    fault_equal_states,
    fault_nan_feature,
    fault_inf_feature,
    fault_opposite_infinities,
    fault_nan_state,
    fault_nan_state_of_one_row,
    fault_nan_row,
    fault_huge,
    fault_tiny,
    fault_scales_apart,
    fault_offset,
    fault_one_feature,
    fault_sink,
)
MASKS: tuple[Callable[[int, int], Tensor | None], ...] = (
    mask_none,
    mask_right,
    mask_left,
    mask_holes,
    mask_empty_row,
    mask_documents,
    mask_missing_document,
    mask_as_many_documents_as_rows,
)
# S, B, T, D: one token, one feature, as few tokens as an estimator takes and one fewer, and odd sizes.
SIZES = (
    (2, 1, 1, 1),
    (3, 2, 1, 5),
    (2, 3, 2, 3),
    (3, 2, 3, 1),
    (2, 2, 4, 1),
    (9, 2, 4, 3),
    (3, 1, 5, 1000),
    (2, 2, 5, 63),
    (9, 1, 17, 3),
    (3, 1, 63, 63),
)


def transposed(states: Tensor) -> Tensor:
    """The same values with the memory of `[B, T, S, D]`, as they lie when captured token by token."""
    return states.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


def strided(states: Tensor) -> Tensor:
    """Every second token and feature of something larger, the rest of which is NaN."""
    large = torch.full((*states.shape[:2], 2 * states.shape[2], 2 * states.shape[3]), torch.nan, dtype=states.dtype)
    large[:, :, ::2, 1::2] = states
    return large[:, :, ::2, 1::2]


def features_first(states: Tensor) -> Tensor:
    return states.transpose(2, 3).contiguous().transpose(2, 3)


def expanded(states: Tensor) -> Tensor:
    """The first state at every depth, in the memory of one."""
    return states[:1].expand_as(states)


def contiguous(states: Tensor) -> Tensor:
    return states


@dataclass(frozen=True)
class Case:
    """States and a mask, made anew from a fixed seed each time they are asked for."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, int, int, int] = (4, 3, 12, 6)
    make_mask: Callable[[int, int], Tensor | None] = mask_none
    fault: Callable[[Tensor], None] = no_fault
    layout: Callable[[Tensor], Tensor] = contiguous
    padding: float = field(default=7.0)
    """What padded tokens hold."""

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), "x".join(map(str, self.shape)), self.make_mask.__name__]
        parts += [made.__name__ for made in (self.fault, self.layout) if made not in (no_fault, contiguous)]
        return "-".join([*parts, *([] if self.padding == 7.0 else [f"padding_{self.padding}"])])

    @property
    def mask(self) -> Tensor | None:
        return self.make_mask(*self.shape[1:3])

    @property
    def states(self) -> Tensor:
        """A random walk through depth, so that neighbouring states are related and far ones less so."""
        generator = torch.Generator().manual_seed(sum(self.shape))
        walk = torch.randn(self.shape, generator=generator, dtype=torch.float64).cumsum(0)
        states = walk.to(self.dtype)
        self.fault(states)
        if (mask := self.mask) is not None:
            states[:, mask == 0] = self.padding
        return self.layout(states)


CASES = (
    *(Case(dtype, make_mask=mask) for dtype in FLOATS for mask in MASKS),
    *(Case(dtype, make_mask=mask, padding=torch.nan) for dtype, mask in zip(cycle(FLOATS), MASKS[1:])),
    *(Case(dtype, shape) for dtype, shape in zip(cycle(FLOATS), SIZES)),
    *(Case(torch.float32, shape, mask_right) for shape in SIZES),
    *(
        Case(dtype, make_mask=mask, fault=fault)
        for fault in FAULTS
        for dtype, mask in ((torch.bfloat16, mask_documents), (torch.float32, mask_none), (torch.float32, mask_holes))
    ),
    *(Case(torch.float64, fault=fault, make_mask=mask_right) for fault in (fault_nan_feature, fault_zero_vectors)),
    *(
        Case(dtype, make_mask=mask_left, layout=layout)
        for layout in (transposed, strided, features_first)
        for dtype in (torch.float32, torch.float64)
    ),
    Case(layout=expanded),
    Case(torch.float64, layout=expanded),
)
"""With at least two states each."""

ONE_STATE = (Case(shape=(1, 2, 5, 3)), Case(torch.bfloat16, (1, 3, 12, 6), mask_documents), Case(shape=(1, 1, 1, 1)))
"""For the statistics that need no depth."""
