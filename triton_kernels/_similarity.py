# Launch options of Triton's kernels are unknown to pyright.
# pyright: reportCallIssue=false
"""Launches the kernels behind `similarity_gradient`. Imported only where Triton runs.

Four kernels, in this order:

1. `unit_sum_kernel` reads the state and adds the unit vectors of pieces of the groups, in float32.
2. `group_sum_kernel` adds the pieces in float64.
3. `coefficient_kernel` finds the similarity, and what each group's gradient is multiplied with.
4. `gradient_kernel` reads the state again, from its end, and writes the gradient.

Nothing waits for the device, and every sum has a fixed order: the same input gives the same bits.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from repflow.triton_kernels._similarity_kernels import (
    coefficient_kernel,
    gradient_kernel,
    group_sum_kernel,
    unit_sum_kernel,
)
from repflow.triton_kernels._sizes import ceil_div, power_of_2
from repflow.triton_kernels._stream import Tokens, cut, describe_tokens
from repflow.triton_kernels.groups import Groups

_ANY = -2.0
"""Below every similarity."""
_SHARED = 64 * 2**10
"""Bytes of shared memory for what a program loads ahead."""


@dataclass(frozen=True)
class Settings:
    """Block sizes; fixed for a shape class, since measuring at run time would make results vary."""

    features: int
    """BD, at least D."""
    tokens: int
    """BT, of a tile."""
    warps: int
    span: int = 32
    """Most tokens of a piece, whose sum in float32 must stay short."""
    programs: int = 264
    """How many programs the groups are cut into, if there are tokens enough: two for each multiprocessor."""

    def stages(self, token_bytes: int) -> int:
        """How many tiles are loaded ahead, within the shared memory of two programs of a multiprocessor.

        Args:
            token_bytes: that a feature of a token takes in all that is loaded.
        """
        return max(1, min(3, 1 + _SHARED // (self.tokens * self.features * token_bytes)))


def choose_settings(features: int) -> Settings:
    """The settings of a shape class: 64 features for each thread, of one token or of up to 16."""
    width = max(64, power_of_2(features))
    warps = min(32, max(2, width // 2048))
    return Settings(width, tokens=max(1, min(16, 2048 * warps // width)), warps=warps)


def similarity_gradient(
    state: Tensor,
    mask: Tensor | Groups | None,
    weight: Tensor,
    target: float | None,
    onto: Tensor | None,
    settings: Settings | None = None,
) -> tuple[Tensor, ...]:
    """Fields of `SimilarityGradient`."""
    settings = settings or choose_settings(state.shape[-1])
    with torch.cuda.device(state.device) if state.is_cuda else nullcontext():
        tokens = describe_tokens(state.unsqueeze(0), mask)
        similarity, unit_sum, coefficient = _sums(state, tokens, weight, target, settings)
        gradient, squares = _gradient(state, tokens, mask, unit_sum, coefficient, onto, settings)
    return gradient, similarity, *squares.unbind()


def _sums(
    state: Tensor, tokens: Tokens, weight: Tensor, target: float | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The similarity [], unit sums [G, D], and coefficients [G]."""
    (rows, row_tokens, features), groups = state.shape, tokens.groups
    pieces = cut(tokens, row_tokens, rows * row_tokens, settings.programs, settings.span)
    width = min(128, power_of_2(features))
    blocks = ceil_div(features, width)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=state.device)

    sums, counts = empty(pieces.count, features), empty(pieces.count, dtype=torch.int32)
    valid, order, begin, first, group = (
        counts if entry is None else entry
        for entry in (tokens.valid, tokens.order, tokens.begin, pieces.first, pieces.group)
    )
    align, strides = _strides(state)
    documents = tokens.order is not None
    unit_sum_kernel[(pieces.count,)](
        state, valid, order, begin, first, group, sums, counts, row_tokens, *strides, pieces.chunks, pieces.span,
        D=features, BD=settings.features, BT=settings.tokens, ALIGN=align, HAS_MASK=tokens.valid is not None,
        DOCUMENTS=documents, STAGES=settings.stages(state.element_size()), num_warps=settings.warps,
    )  # fmt: skip
    unit_sum, count = empty(groups, features), empty(groups, dtype=torch.int64)
    squares = empty(groups, blocks, dtype=torch.float64)
    group_sum_kernel[(groups, blocks)](
        sums, counts, first, unit_sum, squares, count, pieces.chunks,
        D=features, BD=width, DOCUMENTS=documents, num_warps=1,
    )  # fmt: skip
    similarity, coefficient = empty(1, dtype=torch.float64), empty(groups)
    coefficient_kernel[(1,)](
        squares, count, weight, similarity, coefficient, groups,
        F=blocks, BG=64, TARGET=_ANY if target is None else target, num_warps=2,
    )  # fmt: skip
    return similarity[0], unit_sum, coefficient


def _gradient(
    state: Tensor,
    tokens: Tokens,
    mask: Tensor | Groups | None,
    unit_sum: Tensor,
    coefficient: Tensor,
    onto: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """The gradient [B, T, D], and ‖onto‖² and ‖what is added‖² [2]."""
    rows, row_tokens, features = state.shape
    documents = tokens.order is not None
    span = max(16, min(settings.span, rows * row_tokens // settings.programs))
    chunks = ceil_div(row_tokens, span)
    gradient = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    norms = torch.empty(2, rows * chunks, dtype=torch.float32, device=state.device)
    align, (state_strides, onto_strides) = _common_strides(state, state if onto is None else onto)
    loaded = state.element_size() * (1 if onto is None else 2) + 4 * documents
    index = mask.index.contiguous() if documents and isinstance(mask, Groups) else coefficient
    gradient_kernel[(rows * chunks,)](
        state, state if onto is None else onto, coefficient if tokens.valid is None else tokens.valid, index, unit_sum,
        coefficient, gradient, norms, rows * row_tokens, row_tokens, *state_strides, *onto_strides, chunks, span,
        D=features, BD=settings.features, BT=settings.tokens, ALIGN=align, HAS_MASK=tokens.valid is not None,
        HAS_ONTO=onto is not None, DOCUMENTS=documents, STAGES=settings.stages(loaded), num_warps=settings.warps,
    )  # fmt: skip
    return gradient, norms.sum(1, dtype=torch.float64)


def _strides(state: Tensor) -> tuple[int, tuple[int, int]]:
    """What divides the addresses of tokens, and their strides divided by it."""
    align, (strides, _) = _common_strides(state, state)
    return align, strides


def _common_strides(state: Tensor, other: Tensor) -> tuple[int, tuple[tuple[int, int], tuple[int, int]]]:
    own, others = state.stride()[:2], other.stride()[:2]
    align = math.gcd(16 // state.element_size(), *own, *others)
    return align, ((own[0] // align, own[1] // align), (others[0] // align, others[1] // align))
