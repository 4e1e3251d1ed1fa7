"""The Triton kernels of `hsic_statistics` against the reference, on every case, through Triton's interpreter on a CPU.

Short groups go through the fp32 kernels whatever their dtype. `short=False` sends them through those of long ones.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from repflow.triton_kernels import _hsic_kernels, hsic_statistics, reference
from repflow.triton_kernels._dispatch import force
from repflow.triton_kernels.groups import find_groups
from repflow.triton_kernels.hsic import MIN_TOKENS

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same on the device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy, in the interpreter
]

ESTIMATORS = ("unbiased", "biased")
TRUNCATED = 2e-2
"""The interpreter truncates to bfloat16, which makes all entries of a Gram smaller; a GPU rounds them to nearest."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them, and less for the interpreter to do."""
    long = _hsic_kernels.Tiling(rows=16, columns=32, features=16, warps=4, stages=1, parts=2)
    monkeypatch.setattr(_hsic_kernels, "LONG", long)
    monkeypatch.setattr(_hsic_kernels, "LONG_FP32", long)
    monkeypatch.setattr(_hsic_kernels, "SHORT_FP32", replace(long, columns=16, parts=1))


def kernels(states: Tensor, mask: Tensor | None, estimator: str, short: bool) -> tuple[Tensor, ...]:
    mask = torch.ones(states.shape[1:3], dtype=torch.bool) if mask is None else mask
    token, member = reference._group_members(find_groups(mask))
    return _hsic_kernels.hsic_statistics(states, token, member, estimator, MIN_TOKENS[estimator], short=short)


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    """HSIC relative to the geometric mean of the self-HSIC of its states, as CKA has it; moments relative."""
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0].isnan(), want[0].isnan())
    itself = want[0].diagonal(dim1=-2, dim2=-1).abs().sqrt()
    # Two estimates of HSIC differ by rounding of its terms, which Σ‖x‖⁴ bounds; it matters for the unbiased one alone.
    size = want[2].sqrt() / want[1].unsqueeze(-1).clamp(1) ** 0.5
    scale = torch.maximum(itself, 1e-2 * size)
    error = (got[0] - want[0]).abs() / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    assert (error.nan_to_num(0.0, posinf=torch.inf) <= tolerance).all(), error
    # Exactly nothing stays exactly nothing.
    assert torch.equal(got[2] == 0, want[2] == 0)
    for one, other in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)  # of tokens that lie close together


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_agrees_with_the_reference(flat_case, estimator):
    states, mask = flat_case.states, flat_case.mask
    with force("triton"):
        got = hsic_statistics(states, mask, estimator=estimator)
    with force("reference"):
        want = hsic_statistics(states, mask, estimator=estimator)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("fault", ["no_fault", "fault_nan_feature", "fault_nan_state", "fault_offset"])
def test_the_kernels_of_long_groups(dtype, fault, cases):
    """40 tokens: two column tiles, the second of which is mostly empty."""
    case = cases.Case(dtype, (3, 2, 40, 36), cases.mask_holes, getattr(cases, fault))
    for estimator in ESTIMATORS:
        with force("reference"):
            want = hsic_statistics(case.states, case.mask, estimator=estimator)
        got = kernels(case.states, case.mask, estimator, short=False)
        assert_close(got, want, 1e-5 if dtype == torch.float32 else TRUNCATED)


@pytest.mark.parametrize("states", [1, 15, 16, 17, 33, 65])
def test_any_number_of_states(states: int):
    """The contraction covers them with two powers of two."""
    x = torch.randn(states, 1, 9, 8)
    with force("reference"):
        want = hsic_statistics(x)
    assert_close(kernels(x, None, "unbiased", short=True), want, 1e-5)


@pytest.mark.parametrize("panel_bytes", [1, 3 * 16 * 16 * 4 * 2 + 1])
def test_panels_do_not_show(panel_bytes: int, monkeypatch: pytest.MonkeyPatch):
    """One tile at a time, and two with a shorter last panel, over two groups of three tiles."""
    x = torch.randn(3, 2, 30, 20)
    whole = kernels(x, None, "unbiased", short=True)
    monkeypatch.setattr(_hsic_kernels, "_PANEL_BYTES", panel_bytes)
    for one, other in zip(kernels(x, None, "unbiased", short=True), whole, strict=True):
        assert torch.equal(one, other)


def test_groups_in_turn_do_not_show(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(3, 4, 12, 20)
    x[1, 2, 3, 4] = torch.nan
    whole = kernels(x, None, "unbiased", short=True)
    monkeypatch.setattr(_hsic_kernels, "_SUMS_BYTES", 2 * 4 * 3 * 20)
    for one, other in zip(kernels(x, None, "unbiased", short=True), whole, strict=True):
        assert torch.equal(one, other)


def test_the_same_bits_every_time():
    x = torch.randn(3, 1, 50, 24, dtype=torch.bfloat16)
    first, second = (kernels(x, None, "unbiased", short=False) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_magnitudes_whose_squares_leave_fp32(size: float):
    x = torch.randn(3, 1, 20, 24)
    for short, dtype in ((True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)):
        states = (x * size).to(dtype)
        with force("reference"):
            want = hsic_statistics(states)
        assert_close(kernels(states, None, "unbiased", short), want, 1e-5 if short else TRUNCATED)


@pytest.mark.parametrize(("short", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)])
@pytest.mark.parametrize("common", [0.0, 1.0, 50.0])
def test_states_without_structure_have_no_self_hsic(short: bool, dtype: torch.dtype, common: float):
    """One token differs from all others, which are the same: the U-centred Gram is zero, and rounding must not show."""
    states = torch.randn(3, 1, 60, 24)
    states[1] = common * torch.randn(24)
    states[1, 0, 37] += torch.randn(24)
    hsic = kernels(states.to(dtype), None, "unbiased", short)[0][0]
    assert hsic[1, 1] == 0 and (hsic.diagonal()[[0, 2]] > 0).all()
