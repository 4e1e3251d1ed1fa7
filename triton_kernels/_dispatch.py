"""Which implementation a public function takes: its Triton kernel or the plain PyTorch of `reference.py`."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Implementation = Literal["triton", "reference"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CAPABILITY = (8, 0)
"""The first with tensor cores for bfloat16 and TF32."""

_forced: ContextVar[Implementation | None] = ContextVar("forced", default=None)
_installed = find_spec("triton") is not None


def use_triton(states: Tensor) -> bool:
    """Whether the Triton kernels take `states`.

    They do on an NVIDIA GPU of compute capability 8.0 or more, in float16, bfloat16 and float32, if the last dimension
    is contiguous and there is something to compute. Everything else goes to the reference, which is exact and slow:
    float64, other devices, other layouts. On a GPU that the kernels do not take, AMD's among them, or without Triton, a
    warning says so once. Inside `force("triton")` the device does not matter, so that Triton's interpreter
    (`TRITON_INTERPRET=1`) can run the kernels on a CPU; inside `force("reference")` the answer is no.
    """
    forced = _forced.get()
    supported = states.dtype in _DTYPES and states.numel() > 0 and (states.stride(-1) == 1 or states.shape[-1] == 1)
    if forced == "reference" or not supported:
        return False
    if forced == "triton":
        return _installed
    return states.is_cuda and _takes(states.device)


@functools.cache
def _takes(device: torch.device) -> bool:
    """Whether the kernels run on a CUDA device; if not, warn, once since the answer is remembered."""
    obstacle = _obstacle(device)
    if obstacle:
        warnings.warn(
            f"repflow computes in plain PyTorch on {device}, which is many times slower than its Triton kernels: they "
            f"need {obstacle}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not obstacle


def _obstacle(device: torch.device) -> str:
    """What the kernels lack on a CUDA device, or nothing."""
    if not _installed:
        return "the package triton, which is not installed"
    if torch.version.hip is not None:
        return "an NVIDIA GPU, and this is a build of PyTorch for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return "compute capability {}.{}, and this GPU has {}.{}".format(*_CAPABILITY, *capability)
    return ""


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
