"""`similarity_gradient` on a GPU: against the reference at full shapes, without waiting, compiled once."""

import pytest
import torch
from torch import Tensor

from repflow.triton_kernels import _similarity_kernels, similarity_gradient
from repflow.triton_kernels._dispatch import force
from repflow.triton_kernels.groups import find_groups
from tests.triton_kernels.close import assert_similarity_gradient

DEVICE = torch.device("cuda")


def broken(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A state with a common direction, of which some tokens have none."""
    state = (torch.randn(shape, device=DEVICE) + torch.randn(shape[2], device=DEVICE)).to(dtype)
    state[0, 0] = 0
    state[-1, -1, 3] = torch.nan
    state[-1, 1, 0] = torch.inf
    if dtype != torch.float16:
        state[:, 2] *= 1e30
        state[:, 3] *= 1e-30
    return state


@pytest.mark.parametrize("mask", ["none", "bool", "documents", "room"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 2048, 2560), torch.bfloat16),
        ((4, 2048, 4096), torch.bfloat16),
        ((2, 512, 768), torch.bfloat16),
        ((3, 63, 1000), torch.float32),
        ((2, 65, 2560), torch.float16),
        ((1, 7, 100), torch.float32),
        ((3, 65, 63), torch.bfloat16),
        ((2, 65, 5), torch.float16),
        ((2, 33, 20000), torch.bfloat16),
    ],
    ids=str,
)
def test_agrees_with_the_reference(shape, dtype, mask):
    state, chosen = broken(shape, dtype), None
    if mask != "none":
        chosen = torch.randint(0, 2 if mask == "bool" else 4, shape[:2], device=DEVICE)
        chosen = (
            chosen.bool() if mask == "bool" else find_groups(chosen, 3 * shape[0] + 5) if mask == "room" else chosen
        )
    onto = 1e-3 * torch.randn(shape, device=DEVICE).to(dtype)
    for options in ({}, {"onto": onto, "weight": 0.3, "target": -0.5}):
        got, again = (similarity_gradient(state, chosen, **options) for _ in range(2))
        with force("reference"):
            assert_similarity_gradient(got, similarity_gradient(state, chosen, **options), state, chosen, **options)
        assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(got, again, strict=True))


def test_nothing_waits_for_the_device():
    state, weight = broken((2, 64, 256), torch.bfloat16), torch.ones((), device=DEVICE)
    masks = (
        None,
        torch.ones(2, 64, dtype=torch.bool, device=DEVICE),
        torch.ones(2, 64, dtype=torch.long, device=DEVICE),
    )

    def call(mask: Tensor | None) -> None:
        groups = mask if mask is None or mask.dtype == torch.bool else find_groups(mask, 4)
        similarity_gradient(state, groups, weight=weight, target=0.1, onto=state)

    for mask in masks:
        call(mask)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for mask in masks:
            call(mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_numbers_of_tokens_and_groups_compile_nothing():
    weight, counts = torch.ones((), device=DEVICE), set()
    for rows, tokens in ((4, 64), (4, 65), (1, 16), (17, 33)):
        similarity_gradient(torch.randn(rows, tokens, 256, device=DEVICE), weight=weight, target=0.1)
        kernels = (_similarity_kernels.unit_sum_kernel, _similarity_kernels.gradient_kernel)
        counts.add(sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()))
    assert len(counts) == 1, counts
