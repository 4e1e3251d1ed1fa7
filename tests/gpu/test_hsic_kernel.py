"""The Triton kernels behind `hsic_statistics` on the device, at full shapes, against the float64 of the reference."""

import pytest
import torch
from torch import Tensor

from repflow.triton_kernels import HsicStatistics, _hsic_kernels, hsic_statistics
from repflow.triton_kernels._dispatch import force, use_triton
from repflow.triton_kernels.hsic import Estimator

TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 2e-3, torch.float32: 1e-4}
"""Of CKA, absolute."""


def stack(S: int, B: int, T: int, D: int, dtype: torch.dtype) -> Tensor:
    """A random walk through depth with a common direction."""
    state = torch.randn(B, T, D, device="cuda") + torch.randn(D, device="cuda")
    states = torch.empty(S, B, T, D, dtype=dtype, device="cuda")
    for layer in states:
        state += 0.5 * torch.randn_like(state)
        layer.copy_(state)
    return states


def cka(hsic: Tensor) -> Tensor:
    scale = hsic.diagonal(dim1=-2, dim2=-1).sqrt()
    return hsic / (scale.unsqueeze(-1) * scale.unsqueeze(-2))


def both(states: Tensor, mask: Tensor | None, estimator: Estimator) -> tuple[HsicStatistics, HsicStatistics]:
    assert use_triton(states)
    got = hsic_statistics(states, mask, estimator=estimator)
    with force("reference"):
        return got, hsic_statistics(states, mask, estimator=estimator)


def assert_close(got: HsicStatistics, want: HsicStatistics, dtype: torch.dtype) -> None:
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.hsic.isnan(), want.hsic.isnan())
    torch.testing.assert_close(cka(got.hsic), cka(want.hsic), rtol=0, atol=TOLERANCE[dtype], equal_nan=True)
    for one, other in ((got.fourth_moment, want.fourth_moment), (got.fourth_moment_max, want.fourth_moment_max)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def offset(states: Tensor) -> None:
    """100 standard deviations on two features."""
    states[..., :2] += 100 * float(states[0].float().std())


def one_feature(states: Tensor) -> None:
    states[..., -1] *= 1000


def constant(states: Tensor) -> None:
    """So far from zero that the raw Gram would keep nothing of the rest: the one-sided kernel takes this."""
    states[..., :2] = 1e4


def sink(states: Tensor) -> None:
    states[:, :, 0, :2] = 1000


def huge(states: Tensor) -> None:
    states *= 1e30


def tiny(states: Tensor) -> None:
    states *= 1e-30


def plain(states: Tensor) -> None:
    return


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("change", [plain, offset, one_feature, constant, sink, huge, tiny], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_full_shapes(dtype, change, estimator) -> None:
    if dtype == torch.float16 and change in (huge, tiny):
        pytest.skip("beyond float16")
    states = stack(9 if dtype == torch.float32 else 33, 1, 2048, 2560, dtype)
    change(states)
    assert_close(*both(states, None, estimator), dtype)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("shape", [(5, 2, 700, 520), (3, 1, 333, 63), (17, 3, 128, 64), (65, 1, 300, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masks_and_faults(dtype, shape, estimator) -> None:
    states = stack(*shape, dtype)
    mask = torch.rand(shape[1:3], device="cuda") > 0.3
    states[1, -1, 5, 7] = torch.nan
    states[2, 0] = torch.inf
    assert_close(*both(states, mask, estimator), dtype)


@pytest.mark.parametrize("length", [50, 400])
def test_documents(length) -> None:
    states = stack(5, 2, 1000, 256, torch.bfloat16)
    mask = (torch.arange(1000, device="cuda") // length + 1).expand(2, -1)
    assert_close(*both(states, mask, "unbiased"), torch.bfloat16)


def test_equal_tokens_give_zero() -> None:
    states = stack(3, 1, 600, 256, torch.bfloat16)
    states[1] = states[1, :, :1]
    got, want = both(states, None, "unbiased")
    assert got.hsic[0, 1].tolist() == want.hsic[0, 1].tolist() == [0, 0, 0]


def test_a_boolean_mask_waits_for_nothing_and_memory_is_bounded() -> None:
    states = stack(65, 1, 2048, 2560, torch.bfloat16)
    mask = torch.ones(1, 2048, dtype=torch.bool, device="cuda")
    first = hsic_statistics(states, mask)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = hsic_statistics(states, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before <= 0.25e9
    assert all(map(torch.equal, first, again))


def test_compiled_once_whatever_the_length() -> None:
    kernels = [getattr(_hsic_kernels, name) for name in vars(_hsic_kernels) if name.endswith("_kernel")]

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    hsic_statistics(stack(5, 2, 1024, 256, torch.bfloat16))
    before = compiled()
    assert before > 0
    for tokens in (1023, 1000, 777, 512, 300, 257):
        hsic_statistics(stack(5, 2, tokens, 256, torch.bfloat16))
    assert compiled() == before
