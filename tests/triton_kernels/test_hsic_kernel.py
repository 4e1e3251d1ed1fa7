"""The Triton kernels of `hsic_statistics` against the reference, on every case, through Triton's interpreter on a CPU.

Short groups go through the fp32 kernels whatever their dtype. Where `few` is given, only groups of up to that many
tokens do, so that the kernels of long groups are tried on small ones.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from repflow.triton_kernels import HsicStatistics, _hsic_centre, _hsic_gram, _hsic_kernels, hsic_statistics
from repflow.triton_kernels._dispatch import force
from repflow.triton_kernels.hsic import Estimator

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same on the device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy, in the interpreter
]

ESTIMATORS: tuple[Estimator, ...] = ("unbiased", "biased")
HALVES = (torch.bfloat16, torch.float16)
FP32 = 1e-5
"""Of CKA, for the fp32 kernels."""
FP16 = 1e-3
"""Gram entries are rounded to 2⁻¹¹ of themselves, hence products of two to twice that."""
TRUNCATED = 2e-2
"""The interpreter truncates to bfloat16, the left operand of the one-sided kernel alone: all its entries get smaller,
by up to 2⁻⁷. A GPU rounds to nearest."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them, and less for the interpreter to do."""
    long = _hsic_gram.Tiling(rows=16, columns=32, features=16, warps=4, stages=1, parts=2, fp32=False)
    monkeypatch.setattr(_hsic_gram, "LONG", long)
    monkeypatch.setattr(_hsic_gram, "LONG_FP32", replace(long, fp32=True))
    monkeypatch.setattr(_hsic_gram, "SHORT_FP32", replace(long, columns=16, parts=1, fp32=True))
    monkeypatch.setattr(_hsic_centre, "SCAN", (16, 16, 1, 1))


@pytest.fixture
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Up to how many tokens a group goes through the fp32 kernels."""
    monkeypatch.setattr(_hsic_gram, "FEW", request.param)
    return request.param


def kernels(states: Tensor, mask: Tensor | None = None, estimator: Estimator = "unbiased") -> HsicStatistics:
    with force("triton"):
        return hsic_statistics(states, mask, estimator=estimator)


def check(states: Tensor, mask: Tensor | None, estimator: Estimator, tolerance: float) -> Tensor:
    """Returns the largest error of each group."""
    got = kernels(states, mask, estimator)
    with force("reference"):
        want = hsic_statistics(states, mask, estimator=estimator)
    # HSIC relative to the geometric mean of the self-HSIC of its states, as CKA has it; moments relative.
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.hsic.isnan(), want.hsic.isnan())
    itself = want.hsic.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    # Two estimates of HSIC differ by rounding of its terms, which Σ‖x‖⁴ bounds; it matters for the unbiased one alone.
    size = want.fourth_moment.sqrt() / want.count.unsqueeze(-1).clamp(1) ** 0.5
    scale = torch.maximum(itself, 1e-2 * size)
    error = (got.hsic - want.hsic).abs() / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    error = error.nan_to_num(0.0, posinf=torch.inf).amax((-1, -2))
    assert (error <= tolerance).all(), error
    # Exactly nothing stays exactly nothing.
    assert torch.equal(got.fourth_moment == 0, want.fourth_moment == 0)
    for one, other in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)  # of tokens that lie close together
    return error


def test_agrees_with_the_reference(flat_case, cases):
    """Faults matter at the beginning and the estimator at the end: each fault meets both, but not with every mask."""
    biased = flat_case.fault is not cases.no_fault and flat_case.make_mask is cases.mask_documents
    check(flat_case.states, flat_case.mask, "biased" if biased else "unbiased", FP32)


def test_the_biased_estimator_agrees_too(flat_case, cases):
    """On every size, and where the number of tokens decides."""
    if flat_case.fault is cases.no_fault and flat_case.make_mask in (cases.mask_none, cases.mask_right):
        check(flat_case.states, flat_case.mask, "biased", FP32)


@pytest.mark.parametrize("few", [0], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "fault"),
    [(torch.bfloat16, fault) for fault in ("no_fault", "fault_nan_feature", "fault_nan_state", "fault_sink")]
    + [(torch.float16, "fault_nan_feature"), (torch.float32, "no_fault"), (torch.float32, "fault_nan_state")],
    ids=str,
)
def test_the_kernels_of_long_groups(dtype, fault, few, cases):
    """36 tokens: two column tiles, the second of which is mostly empty."""
    mask = cases.mask_none if fault == "no_fault" else cases.mask_right
    case = cases.Case(dtype, (2, 2, 36, 20), mask, getattr(cases, fault))
    for estimator in ESTIMATORS if fault == "no_fault" else ESTIMATORS[:1]:
        check(case.states, case.mask, estimator, FP32 if dtype == torch.float32 else FP16)


@pytest.mark.parametrize("few", [0], indirect=True)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_one_sided_kernel(dtype, few):
    """A constant far larger than the rest, in one of two states and one of two groups."""
    states = torch.randn(2, 2, 40, 20)
    states[1, 0, :, 3] += 300.0
    check(states.to(dtype), None, "unbiased", TRUNCATED if dtype == torch.bfloat16 else FP16)


@pytest.mark.parametrize("few", [8], indirect=True)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("constant", [0.0, 1e4])
def test_few_tokens_of_long_rows_are_exact(dtype, few, constant):
    """Rounding averages out over many tokens only; 1e4 would take the one-sided kernel. The last row is long."""
    mask = torch.zeros(4, 34, dtype=torch.bool)
    for row, tokens in enumerate((0, 4, 8, 34)):
        mask[row, torch.randperm(34)[:tokens]] = True
    states = torch.randn(2, 4, 34, 12)
    states[:, :3, :, 0] += constant
    error = check(states.to(dtype), mask, "unbiased", FP16)
    assert (error[:3] <= FP32).all(), error


@pytest.mark.parametrize("few", [0, 8], indirect=True)
def test_documents_of_very_different_length(few):
    """Tiles beyond the end of a short document are neither computed nor read: their memory is NaN here."""
    mask = torch.ones(1, 55, dtype=torch.int64)
    mask[0, :15] = torch.arange(15) // 5 + 2
    check(torch.randn(2, 1, 55, 8).bfloat16(), mask, "unbiased", FP16)


@pytest.mark.parametrize("states", [1, 16, 17, 33])
def test_any_number_of_states(states: int):
    """The contraction covers them with two powers of two."""
    check(torch.randn(states, 1, 4, 3), None, "unbiased", FP32)


def test_two_powers_of_two_cover_any_number_of_states():
    for states in range(1, _hsic_kernels.MAX_STATES + 1):
        main, rest = _hsic_gram._split(states)
        assert (main < states) == (rest > 0) and main + rest >= states and 16 <= main <= 128


def test_more_states_than_the_kernels_hold_go_to_the_reference():
    states = torch.randn(_hsic_kernels.MAX_STATES + 1, 1, 4, 1)
    with force("reference"):
        want = hsic_statistics(states)
    assert torch.equal(kernels(states).hsic, want.hsic)


@pytest.mark.parametrize("panel_bytes", [1, 2 * 16 * 16 * 4 * 2 + 1])
def test_panels_do_not_show(panel_bytes: int, monkeypatch: pytest.MonkeyPatch):
    """One tile at a time, and two with a shorter last panel, over two groups of three tiles."""
    x = torch.randn(2, 2, 30, 8)
    whole = kernels(x)
    monkeypatch.setattr(_hsic_gram, "PANEL_BYTES", panel_bytes)
    assert all(map(torch.equal, kernels(x), whole))


def test_groups_in_turn_do_not_show(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(2, 4, 6, 20)
    x[1, 2, 3, 4] = torch.nan
    whole = kernels(x)
    for name, limit in (("_SUMS_BYTES", 2 * 4 * 2 * 20), ("_MAX_GROUPS", 3)):
        monkeypatch.setattr(_hsic_kernels, name, limit)
        assert all(map(torch.equal, kernels(x), whole))


@pytest.mark.parametrize("few", [0], indirect=True)
def test_the_same_bits_every_time(few):
    x = torch.randn(2, 1, 34, 10, dtype=torch.bfloat16)
    assert all(map(torch.equal, kernels(x), kernels(x)))


@pytest.mark.parametrize(
    ("few", "dtype"), [(128, torch.float32), (128, torch.bfloat16), (0, torch.bfloat16)], indirect=["few"]
)
@pytest.mark.parametrize("size", [1e37, 1e-35])
def test_magnitudes_whose_squares_leave_fp32(size: float, few: int, dtype: torch.dtype):
    check((torch.randn(2, 1, 18, 12) * size).to(dtype), None, "unbiased", FP32 if few else TRUNCATED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_that_leave_fp32(dtype):
    """Up to 3e38, the end of the range: differences of two tokens are infinite already."""
    states = torch.rand(2, 1, 12, 5) * 2 - 1
    check((states * 3e38).to(dtype), None, "unbiased", FP32)


@pytest.mark.parametrize(
    ("few", "dtype"), [(128, torch.float32), (128, torch.bfloat16), (0, torch.bfloat16)], indirect=["few"]
)
@pytest.mark.parametrize("common", [0.0, 1.0, 50.0])
def test_states_without_structure_have_no_self_hsic(few: int, dtype: torch.dtype, common: float):
    """One token differs from all others, which are the same: the U-centred Gram is zero, and rounding must not show."""
    states = torch.randn(3, 1, 34, 16)
    states[1] = common * torch.randn(16)
    states[1, 0, 31] += torch.randn(16)
    hsic = kernels(states.to(dtype)).hsic[0]
    assert hsic[1, 1] == 0 and (hsic.diagonal()[[0, 2]] > 0).all()


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_storage_that_is_not_aligned(offset: int):
    """Rows and the first of them at odd places in memory, with NaN around."""
    memory = torch.full((2, 2, 12, 19), torch.nan, dtype=torch.bfloat16)
    memory[..., offset : offset + 8] = torch.randn(2, 2, 12, 8)
    check(memory[..., offset : offset + 8], None, "unbiased", FP32)
