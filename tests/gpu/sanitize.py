"""Launch every kernel on small, odd shapes, for compute-sanitizer to watch. From the root of the repository:

    export PYTHONPATH=src:. PYTORCH_NO_CUDA_MEMORY_CACHING=1
    python tests/gpu/sanitize.py
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/gpu/sanitize.py

Without PyTorch's caching every tensor is an allocation of its own, so that a step outside of it shows. The first run
compiles, which later ones find in Triton's cache. Results are compared with the reference only roughly, on the CPU:
tests/gpu holds them to their tolerances.
"""

import importlib
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from repflow import triton_kernels
from repflow.triton_kernels import depth_and_token_sums, depth_statistics, hsic_statistics, token_sums
from repflow.triton_kernels._dispatch import use_triton

DEVICE = torch.device("cuda")


def padded(rows: int, tokens: int) -> Tensor:
    return torch.arange(tokens).expand(rows, -1) < tokens - 3 * torch.arange(rows).unsqueeze(1)


def mostly_padded(rows: int, tokens: int) -> Tensor:
    """The last row keeps five tokens, far apart."""
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[-1] = torch.arange(tokens) % (tokens // 5 + 1) == 1
    return mask


def documents(rows: int, tokens: int) -> Tensor:
    """Of 1, 2, 4, 8 … tokens, after one token of padding."""
    return torch.arange(tokens).add(1).log2().floor().long().expand(rows, -1)


def everything(rows: int, tokens: int) -> None:
    return None


def faulty(states: Tensor) -> None:
    """NaN, infinity, the zero vector, tiny and huge states."""
    states[0, 0, 3, 0], states[-1, -1, 5, -1] = torch.nan, torch.inf
    states[:, :, 7] = 0
    if states.dtype != torch.float16:
        states[0] *= 1e-30
        states[-1] *= 1e30


def far(states: Tensor) -> None:
    """A constant so large that HSIC centres its operands on the device; another state is left alone."""
    states[1:, ..., 0] += 1e4


CASES: tuple[tuple[torch.dtype, tuple[int, ...], Callable[[int, int], Tensor | None], Callable | None], ...] = (
    (torch.bfloat16, (3, 2, 261, 72), mostly_padded, far),
    (torch.bfloat16, (17, 1, 129, 63), everything, None),
    (torch.bfloat16, (2, 3, 1, 63), everything, None),
    (torch.float16, (3, 2, 37, 63), documents, faulty),
    (torch.float16, (2, 1, 131, 63), padded, far),
    (torch.float32, (5, 3, 65, 63), padded, faulty),
    (torch.float32, (2, 1, 300, 63), documents, None),
)


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        one, other = one.cpu().double(), other.double()
        finite = other[other.isfinite()]
        largest = float(finite.abs().max()) if len(finite) else 0.0
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * largest, equal_nan=True)


def run_case(dtype: torch.dtype, shape: tuple[int, ...], make_mask: Callable, change: Callable | None) -> None:
    states = torch.randn(shape).cumsum(0)
    states = (states + torch.randn(shape[-1])).to(dtype)
    if change is not None:
        change(states)
    mask = make_mask(*shape[1:3])
    # Their end is the end of what is allocated, and their beginning is not aligned if D is odd.
    there = states.to(DEVICE), None if mask is None else mask.to(DEVICE)
    assert use_triton(there[0])
    for function in (depth_statistics, token_sums):
        assert_near(function(*there), function(states, mask))
    both = depth_and_token_sums(*there)
    assert_near(both[0] + both[1], depth_statistics(states, mask) + token_sums(states, mask))
    for estimator in ("unbiased", "biased"):
        assert_near(hsic_statistics(*there, estimator=estimator), hsic_statistics(states, mask, estimator=estimator))


def all_kernels() -> set[str]:
    """Names of the functions of repflow that are launched on a device."""
    found = set()
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        members = vars(importlib.import_module(f"repflow.triton_kernels.{module.name}"))
        found |= {name for name, member in members.items() if isinstance(member, JITFunction) and "_kernel" in name}
    return found


def main() -> None:
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        sys.exit("sanitize.py: expected PYTORCH_NO_CUDA_MEMORY_CACHING=1, without which overruns stay unseen; set it")
    launched: Counter[str] = Counter()
    launch = JITFunction.run

    def counting(self: JITFunction, *args: Any, **options: Any) -> Any:
        launched[self.fn.__name__] += 1
        return launch(self, *args, **options)

    JITFunction.run = counting
    torch.manual_seed(0)
    for case in CASES:
        run_case(*case)
        torch.cuda.synchronize()
        print(*case[:2], *(getattr(entry, "__name__", "-") for entry in case[2:]), flush=True)
    for name, times in sorted(launched.items()):
        print(f"{times:5d} {name}")
    missing = all_kernels() - set(launched)
    if missing:
        sys.exit(f"sanitize.py: expected every kernel to be launched, but these were not: {', '.join(sorted(missing))}")
    print("OK")


if __name__ == "__main__":
    main()
