"""Print as JSON, for each function, dtype and length of a sequence, which compilations its launches ask for.

Run as a program, without a GPU, since kernels must be imported without `TRITON_INTERPRET`, which the other tests need.
"""

import json
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from repflow import triton_kernels
from repflow.triton_kernels._dispatch import force


class Driver:
    """An H200 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


SHAPES = ((2, 100), (2, 1024), (1, 1), (3, 2), (5, 17), (4, 128), (1, 129), (16, 16), (3, 777), (1, 2048))
"""Rows and tokens."""

asked: set[str] = set()


def note(*, key: str, fn: Any, **_: Any) -> bool:
    """Called before a compilation; True calls it off."""
    asked.add(f"{fn.name} {key}")
    return True


launch = JITFunction.run


def only_ask(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    launch(self, *args, grid=grid, warmup=True, **options)


def lengths(function: str, dtype: torch.dtype) -> dict[str, list[str]]:
    """What the launches for each length ask for."""
    result = {}
    for rows, tokens in SHAPES:
        keep = torch.arange(tokens).expand(rows, -1) < tokens - torch.arange(rows).unsqueeze(1)
        asked.clear()
        with force("triton"):
            for mask in (None, keep):
                getattr(triton_kernels, function)(torch.empty(5, rows, tokens, 64, dtype=dtype), mask)
        result[f"{rows}x{tokens}"] = sorted(asked)
    return result


def main() -> None:
    triton.runtime.driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    knobs.runtime.jit_cache_hook = note
    JITFunction.run = only_ask
    functions, dtypes = ("depth_and_token_sums", "pairwise_hsic"), ("bfloat16", "float32")
    result = {
        f"{function} {dtype}": lengths(function, getattr(torch, dtype)) for function in functions for dtype in dtypes
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
