"""What cannot be beaten: reading the states once, and half the Gram products at the rate of a large product.

Triton must not be imported before its interpreter is chosen, so neither must this module.
"""

# Triton's language is typed for its compiler, not for pyright.
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from _cases import Case
from _measure import Product, Timing, run_once, time_call
from torch import Tensor

_BLOCK = 8192
"""Words of 4 bytes that one program reads."""


@triton.jit
def _read_kernel(
    words,  # [count] int32
    sums,  # [programs] int32
    count,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    offset = program * BLOCK + tl.arange(0, BLOCK)
    # Half of each word: a sum of them stays within 32 bits.
    half = tl.load(words + offset, mask=offset < count, other=0) & 0xFFFF
    tl.store(sums + program, tl.sum(half, axis=0))


def read_once(states: Tensor) -> Timing:
    """Time to add up half of each 4-byte word of the contiguous `states`, in one kernel: each element is read once.

    Raises:
        RuntimeError: the sum is not the one that PyTorch finds.
    """
    words = states.view(torch.int32).flatten()
    sums = torch.empty(triton.cdiv(words.numel(), _BLOCK), dtype=torch.int32, device=states.device)

    def read() -> None:
        _read_kernel[sums.shape](words, sums, words.numel(), BLOCK=_BLOCK, num_warps=8)

    run_once(read, states.device)
    run = run_once(read, states.device)
    got, want = int(sums.sum(dtype=torch.int64)), int((words & 0xFFFF).sum(dtype=torch.int64))
    if got != want:
        raise RuntimeError(f"floor: expected the words of the states to add up to {want}, got {got}")
    return time_call(read, run.ms, states.device)


def square_product(size: int, device: torch.device) -> Product:
    """Time the product of random matrices.

    Raises:
        RuntimeError: its first rows are farther from float64 than a result rounded to bf16 can be.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, size, size)
    left, right = torch.randn(shape, generator=generator, device=device).bfloat16()
    run_once(lambda: left @ right, device)
    run = run_once(lambda: left @ right, device)
    want = left[:8].double() @ right.double()
    error = float((run.result[:8] - want).abs().max() / want.abs().max())
    if not error <= torch.finfo(torch.bfloat16).eps:
        raise RuntimeError(f"floor: the bf16 product is wrong by {error:.1e} of its largest entry")
    return Product(size, time_call(lambda: left @ right, run.ms, device))


def half_the_grams(case: Case, product: Product) -> Timing:
    """Time of the Gram products of `case`, of which one half follows by symmetry, at the rate of `product`."""
    num_states, rows, tokens, features = case.shape
    share = num_states * rows * tokens**2 * features / (2 * product.size**3)
    taken = product.time
    low, high = (None if entry is None else share * entry for entry in (taken.ms_p20, taken.ms_p80))
    return Timing(share * taken.ms, low, high, "from the product")
