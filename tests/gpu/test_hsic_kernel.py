"""The Triton kernels behind `hsic_statistics` on the device, at full shapes, against the float64 of the reference.

Few numbers of features, since each is a compilation of its own.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from repflow.triton_kernels import HsicStatistics, hsic_statistics
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


def assert_close(got: HsicStatistics, want: HsicStatistics, tolerance: float) -> None:
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.hsic.isnan(), want.hsic.isnan())
    torch.testing.assert_close(cka(got.hsic), cka(want.hsic), rtol=0, atol=tolerance, equal_nan=True)
    for one, other in ((got.fourth_moment, want.fourth_moment), (got.fourth_moment_max, want.fourth_moment_max)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def plain(states: Tensor) -> None:
    return


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


def four_sinks(states: Tensor) -> None:
    """Six entries of the Gram are all that matters: nothing averages their rounding out."""
    states[:, :, ::500] *= 100


def huge(states: Tensor) -> None:
    states *= 1e36


def tiny(states: Tensor) -> None:
    states *= 1e-34


CHANGES: tuple[Callable[[Tensor], None], ...] = (plain, offset, one_feature, constant, sink, four_sinks, huge, tiny)
CASES = [(torch.bfloat16, change) for change in CHANGES]
CASES += [(torch.float16, change) for change in CHANGES[:5]]  # the others leave its range
CASES += [(torch.float32, change) for change in CHANGES]


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize(("dtype", "change"), CASES, ids=[f"{dtype}-{change.__name__}" for dtype, change in CASES])
def test_full_shapes(dtype, change, estimator) -> None:
    states = stack(9 if dtype == torch.float32 else 33, 1, 2048, 2560, dtype)
    change(states)
    assert_close(*both(states, None, estimator), TOLERANCE[dtype])


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("shape", [(5, 2, 700, 63), (17, 3, 128, 63), (65, 1, 300, 63)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masks_and_faults(dtype, shape, estimator) -> None:
    S, B, T, D = shape
    states = stack(S, B, T, D, dtype)
    mask = torch.rand(B, T, device="cuda") > 0.3
    states[1, -1, 5, 7] = torch.nan
    states[2, 0] = torch.inf
    assert_close(*both(states, mask, estimator), TOLERANCE[dtype])


@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize("features", [1, 64, 8192])
def test_few_valid_tokens_in_long_rows(features, far) -> None:
    """They go through the fp32 kernels, which is decided on the device; 1e4 would take the one-sided kernel."""
    mask = torch.zeros(9, 1000, dtype=torch.bool, device="cuda")
    for row, tokens in enumerate((0, 1, 3, 4, 5, 10, 40, 128, 129)):
        mask[row, torch.randperm(1000, device="cuda")[:tokens]] = True
    states = stack(5, 9, 1000, features, torch.bfloat16)
    states[1:3, ..., 0] += far
    got, want = both(states, mask, "unbiased")
    assert_close(got, want, 2e-3)
    if features > 1 or not far:  # bfloat16 has steps of 64 at 1e4: of one feature next to nothing is left
        short = slice(None, -1)
        torch.testing.assert_close(cka(got.hsic)[short], cka(want.hsic)[short], rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("states", [1, 2, 16, 129, 200, 256])
def test_any_number_of_states(states, dtype) -> None:
    assert_close(*both(stack(states, 1, 300, 63, dtype), None, "unbiased"), TOLERANCE[dtype])


def documents(lengths: list[int]) -> Tensor:
    numbers = torch.arange(1, len(lengths) + 1, device="cuda")
    return numbers.repeat_interleave(torch.tensor(lengths, device="cuda")).unsqueeze(0)


@pytest.mark.parametrize("lengths", [[10] * 400, [400] * 5, [1500, *range(2, 40), 130, 700]], ids=str)
def test_documents(lengths) -> None:
    mask = documents(lengths)
    assert_close(*both(stack(5, 1, mask.shape[1], 64, torch.bfloat16), mask, "unbiased"), 2e-3)


def test_more_groups_than_a_launch_takes() -> None:
    """One token each, on which nothing is defined; a grid has at most 65,535 in its third dimension."""
    got = hsic_statistics(torch.randn(2, 70_000, 1, 64, device="cuda").bfloat16())
    assert got.count.tolist() == [1] * 70_000 and got.hsic.isnan().all()


@pytest.mark.parametrize("start", [1, 8])
def test_storage_that_is_not_aligned(start: int) -> None:
    memory = torch.full((5, 2, 300, 75), torch.nan, dtype=torch.bfloat16, device="cuda")
    memory[..., start : start + 64] = stack(5, 2, 300, 64, torch.bfloat16)
    assert_close(*both(memory[..., start : start + 64], None, "unbiased"), 2e-3)


def test_the_memory_order_of_tokens_does_not_matter() -> None:
    """As they lie when captured token by token."""
    states = stack(5, 3, 400, 64, torch.bfloat16)
    other = states.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert all(map(torch.equal, hsic_statistics(states), hsic_statistics(other)))


def test_more_elements_than_int32_counts() -> None:
    """2.8e9 of them: the last row must be found where it is."""
    states = torch.empty(33, 16, 2048, 2560, dtype=torch.bfloat16, device="cuda").normal_()
    last = states[:, -1:].contiguous()
    for one, other in zip(hsic_statistics(states), hsic_statistics(last), strict=True):
        assert torch.equal(one[-1:], other)


def test_what_the_kernels_do_not_take_is_computed_all_the_same() -> None:
    states = stack(3, 2, 40, 64, torch.float32)
    want = hsic_statistics(states.double().cpu())
    for other in (states.double(), states.mT.contiguous().mT, states.repeat_interleave(2, -1)[..., ::2]):
        assert not use_triton(other)
        torch.testing.assert_close(hsic_statistics(other).hsic.cpu(), want.hsic, rtol=1e-9, atol=0)


def test_a_mask_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="`hsic_statistics`: states are on cuda:0 and the mask on cpu; move the mask"):
        hsic_statistics(stack(2, 1, 5, 64, torch.bfloat16), torch.ones(1, 5, dtype=torch.bool))


def test_negative_document_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="from 0 \\(padding\\) up, got -1"):
        hsic_statistics(stack(2, 1, 5, 64, torch.bfloat16), torch.tensor([[1, 1, 2, 2, -1]], device="cuda"))


def test_equal_tokens_give_zero() -> None:
    states = stack(3, 1, 600, 64, torch.bfloat16)
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
