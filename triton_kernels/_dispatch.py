"""Which implementation a public function takes: its Triton kernel or the plain PyTorch of `reference.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Implementation = Literal["triton", "reference"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_forced: ContextVar[Implementation | None] = ContextVar("forced", default=None)
_installed = find_spec("triton") is not None


def use_triton(states: Tensor) -> bool:
    """Whether the Triton kernels take `states`.

    They do on a CUDA device, in float16, bfloat16 and float32, if the last dimension is contiguous and there is
    something to compute. Everything else goes to the reference, which is exact and slow: float64, other devices, other
    layouts. Inside `force("triton")` the device does not matter, so that Triton's interpreter (`TRITON_INTERPRET=1`)
    can run the kernels on a CPU; inside `force("reference")` the answer is no.
    """
    forced = _forced.get()
    if forced == "reference" or not _installed:
        return False
    supported = states.dtype in _DTYPES and states.numel() > 0 and (states.stride(-1) == 1 or states.shape[-1] == 1)
    return supported and (states.is_cuda or forced == "triton")


@contextmanager
def force(implementation: Implementation) -> Iterator[None]:
    """Choose the implementation inside the block, for tests and benchmarks; `use_triton` says what that means."""
    if implementation not in get_args(Implementation):
        raise ValueError(f'`force`: expected "triton" or "reference", got {implementation!r}')
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)
