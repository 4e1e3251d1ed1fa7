"""Time and extra memory of one call, and how far a result is from the truth."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from _cases import Case
from torch import Tensor

SLOW_MS = 200
"""A call that takes longer is timed by a single run, after a first one that warms up."""


@dataclass(frozen=True)
class Run:
    """One call: its result, how long it took from start to finish, and the most memory that it added."""

    result: Any
    ms: float
    memory_mib: float | None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated calls: median, 20th and 80th percentile, and how they were taken."""

    ms: float
    ms_p20: float | None
    ms_p80: float | None
    timing: str

    def columns(self) -> dict[str, object]:
        """The columns of these names."""
        return asdict(self)


class Product(NamedTuple):
    """A bf16 matrix product of two `[size, size]` matrices, and its time."""

    size: int
    time: Timing


def run_once(call: Callable[[], Any], device: torch.device) -> Run:
    """Call once; memory is the peak above what was allocated before, results included, on a CUDA device only."""
    if device.type != "cuda":
        start = time.perf_counter()
        return Run(call(), 1e3 * (time.perf_counter() - start), None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    ms = 1e3 * (time.perf_counter() - start)
    return Run(result, ms, (torch.cuda.max_memory_allocated() - before) / 2**20)


def time_call(call: Callable[[], Any], last_ms: float, device: torch.device) -> Timing:
    """Time a call that has run before and took `last_ms`: Triton's `do_bench`, or that run where it took long."""
    if device.type != "cuda" or last_ms > SLOW_MS:
        return Timing(last_ms, None, None, "1 run")
    from triton.testing import do_bench  # not at the top: Triton must not be imported before its interpreter is chosen

    # At least five repetitions, also of what takes longer than a fifth of the 100 ms that are the default.
    quantiles = do_bench(call, rep=max(100, round(5 * last_ms)), quantiles=[0.5, 0.2, 0.8])
    return Timing(*quantiles, timing="do_bench")  # pyright: ignore[reportOptionalIterable, reportCallIssue]


def largest_error(got: Tensor, want: Tensor, *, relative: bool = False) -> float:
    """The largest |got − want|, or |got − want|/|want|; infinite where one of the two alone is NaN."""
    got, want = got.double(), want.double()
    if not torch.equal(got.isnan(), want.isnan()):
        return math.inf
    error = (got - want).abs()
    return float((error / want.abs() if relative else error).nan_to_num(0.0, math.inf).max())


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` as a CUDA graph, captured at its first use: the time that the GPU needs once the launches are prepared."""
    captured: list[tuple[torch.cuda.CUDAGraph, Any]] = []

    def replay() -> Any:
        if not captured:
            call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()
            captured.append((graph, result))
        captured[0][0].replay()
        return captured[0][1]

    return replay


@lru_cache(maxsize=1)
def compiled(function: Callable[..., Any], case: Case, device: torch.device) -> Callable[..., Any]:
    """`function` under torch.compile, once per case; without a GPU only traced, which needs no C++ compiler."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")
