"""What holds for every kernel whatever its formula: chunks, memory, the caller's tensors and settings do not matter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from repflow.triton_kernels import depth_statistics, hsic_statistics, reference, token_sums

KERNELS: tuple[Callable[..., tuple[Tensor, ...]], ...] = (depth_statistics, token_sums, hsic_statistics)

# Chunks and layouts change the order of float64 sums; what they sum is of order 1 to 100 and partly cancels.
close = {"rtol": 1e-11, "atol": 1e-12, "equal_nan": True}


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        rounding = {**close, "rtol": 1e-6} if one.dtype == torch.float32 else close
        torch.testing.assert_close(one, other, **rounding)


@pytest.fixture(params=["mask_none", "mask_holes", "mask_documents"])
def inputs(request, cases) -> tuple[Tensor, Tensor | None]:
    case = cases.Case(make_mask=getattr(cases, request.param), fault=cases.fault_nan_feature)
    return case.states, case.mask


def set_chunks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the size in bytes of everything that the reference works through in chunks."""
    names = [name for name in vars(reference) if name.endswith("_BYTES")]
    assert names
    for name in names:
        monkeypatch.setattr(reference, name, size)


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 4 * 6 * 5, 8 * 4 * 6 * 7 + 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_chunks_do_not_show(kernel, chunk_bytes: int, inputs, monkeypatch: pytest.MonkeyPatch):
    """One token at a time, and a few with a shorter last chunk."""
    whole = kernel(*inputs)
    set_chunks(chunk_bytes, monkeypatch)
    assert_same(kernel(*inputs), whole)


@pytest.mark.parametrize("rows", [1, 2, 5, 11, 12, 13])
def test_panels_of_gram_rows_do_not_show(rows: int, inputs, monkeypatch: pytest.MonkeyPatch):
    """The zero diagonal moves with the panel."""
    states, mask = inputs
    whole = hsic_statistics(states, mask)
    longest = 5 if mask is not None and mask.max() > 1 else states.shape[2]
    set_chunks(8 * len(states) * len(whole.count) * longest * rows, monkeypatch)
    assert_same(hsic_statistics(states, mask), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_states_stay_as_they_were(kernel, dtype: torch.dtype, cases):
    case = cases.Case(dtype, make_mask=cases.mask_holes, fault=cases.fault_nan_feature)
    states, mask = case.states, case.mask
    kernel(states, mask)
    assert torch.equal(states.nan_to_num(nan=-1e4), case.states.nan_to_num(nan=-1e4))
    assert torch.equal(mask, case.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_states_with_a_gradient_are_fine(kernel, dtype: torch.dtype, cases):
    case = cases.Case(dtype, make_mask=cases.mask_right)
    got = kernel(case.states.requires_grad_(), case.mask)
    assert_same(tuple(entry.detach() for entry in got), kernel(case.states, case.mask))


@pytest.mark.parametrize("kernel", KERNELS)
def test_inference_mode_changes_nothing(kernel, cases):
    case = cases.Case(torch.float64, make_mask=cases.mask_documents)
    want = kernel(case.states, case.mask)
    with torch.inference_mode():
        got = kernel(case.states, case.mask)
    assert_same(got, want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_changes_nothing(kernel, inputs):
    want = kernel(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kernel(*inputs)
    assert_same(got, want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_padding_holds_does_not_matter(kernel, cases):
    padded = [cases.Case(make_mask=cases.mask_holes, padding=padding) for padding in (0.0, 1e30, torch.nan, torch.inf)]
    first, *rest = (kernel(case.states, case.mask) for case in padded)
    for other in rest:
        assert_same(other, first)
