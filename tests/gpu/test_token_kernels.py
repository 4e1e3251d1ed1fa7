"""`depth_statistics` and `token_sums` on a GPU: against the reference, without waiting, compiled once."""

import pytest
import torch

from repflow.triton_kernels import _stream, depth_statistics, token_sums
from repflow.triton_kernels._dispatch import force
from tests.triton_kernels.close import assert_depth, assert_sums

DEVICE = torch.device("cuda")


def walk(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """States with a common direction, each a little further than the one before."""
    states = torch.empty(shape, dtype=dtype, device=DEVICE)
    here = torch.randn(shape[1:], device=DEVICE) + torch.randn(shape[3], device=DEVICE)
    for state in states:
        state.copy_(here)
        here += 0.3 * torch.randn(shape[1:], device=DEVICE)
    return states


def break_some(states: torch.Tensor) -> None:
    states[1, :, 0] = 0
    states[0, 0, -1, 3] = torch.nan
    states[-1, -1, 1, 0] = torch.inf
    if states.dtype != torch.float16:
        states[:, :, 2] *= 1e30
        states[:, :, 3] *= 1e-30


@pytest.mark.parametrize("mask", ["none", "bool", "documents"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((33, 4, 2048, 2560), torch.bfloat16),
        ((13, 1, 512, 768), torch.bfloat16),
        ((5, 3, 63, 1000), torch.float32),
        ((9, 2, 65, 2560), torch.float16),
        ((200, 1, 7, 100), torch.float32),
        ((5, 3, 65, 63), torch.float32),
        ((6, 2, 65, 63), torch.bfloat16),
        ((2, 2, 65, 5), torch.float16),
    ],
    ids=str,
)
def test_agrees_with_the_reference(shape, dtype, mask):
    states = walk(shape, dtype)
    break_some(states)
    chosen = None
    if mask != "none":
        chosen = torch.randint(0, 4 if mask == "documents" else 2, shape[1:3], device=DEVICE)
        chosen = chosen.bool() if mask == "bool" else chosen
    depth, sums = depth_statistics(states, chosen), token_sums(states, chosen)
    with force("reference"):
        assert_depth(depth, depth_statistics(states, chosen), states)
        assert_sums(sums, token_sums(states, chosen))
    for entry, again in zip(depth + sums, depth_statistics(states, chosen) + token_sums(states, chosen), strict=True):
        assert torch.equal(entry.nan_to_num(), again.nan_to_num())


def test_nothing_waits_and_lengths_share_a_compilation():
    kernels = (_stream.walk_kernel, _stream.finish_kernel, _stream.sum_kernel, _stream.total_kernel)

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    counts = []
    for rows, tokens in ((2, 40), (1, 1), (3, 64), (2, 1001), (4, 512), (16, 16)):
        states = walk((6, rows, tokens, 512), torch.bfloat16)
        mask = torch.rand(rows, tokens, device=DEVICE) > 0.3
        torch.cuda.set_sync_debug_mode("error")
        try:
            depth_statistics(states, mask)
            token_sums(states, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(compiled())
    assert len(set(counts)) == 1, counts
