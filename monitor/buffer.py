"""The memory that captured states are copied into."""

from math import prod

import torch
from torch import Tensor


class CaptureBuffer:
    """One flat tensor that every forward's states are copied into, reused from step to step.

    It has the size and the promoted dtype of what was captured so far, up to `max_memory_mib`: never narrower than the
    states.
    """

    def __init__(self, max_memory_mib: int) -> None:
        self._limit = max_memory_mib * 2**20
        self._flat: Tensor | None = None
        self._widest: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Size of what is held. Unit: bytes."""
        return 0 if self._flat is None else self._flat.nbytes

    def capacity(self, state: Tensor, num_states: int) -> int:
        """Most tokens of `num_states` states like `state` that fit."""
        return self._limit // (num_states * state.shape[-1] * self._dtype(state).itemsize)

    def view(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The buffer as a contiguous tensor of `shape` on the device of `like`, with whatever content it had."""
        size, dtype = prod(shape), self._dtype(like)
        flat = self._flat
        if flat is None or flat.numel() < size or flat.dtype != dtype or flat.device != like.device:
            self._flat = flat = None  # freed before the larger one is allocated
            self._flat = flat = torch.empty(size, dtype=dtype, device=like.device)
        return flat[:size].view(shape)

    def expect(self, dtype: torch.dtype) -> None:
        """Have room for states of `dtype` from the first view on, however narrow the state that it is made for."""
        self._widest = dtype if self._widest is None else torch.promote_types(self._widest, dtype)

    def widen(self, view: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The same view and content in `dtype`; None if that exceeds the limit, and only later views will have it."""
        self._flat = None
        self._widest = dtype
        if view.numel() * dtype.itemsize > self._limit:
            return None
        return self.view(tuple(view.shape), view).copy_(view)

    def release(self) -> None:
        """Give the memory back."""
        self._flat = None

    def _dtype(self, like: Tensor) -> torch.dtype:
        self.expect(like.dtype)
        assert self._widest is not None
        return self._widest
