"""`depth_statistics` against loops over tokens."""

import numpy as np
import pytest
import torch

from repflow.triton_kernels import depth_statistics

# The statistics are computed in float64 and rounded once to the dtype of the maps: half a unit in the last place, and
# for float64 some ten roundings of a sum over features.
RELATIVE = {torch.float32: 2.0**-24 + 1e-12, torch.float64: 1e-13}
EPS = np.finfo(np.float64).eps


def map_dtype(states: torch.Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def largest(h: np.ndarray) -> float:
    """The largest finite entry: differences of states cancel down to its rounding."""
    return float(np.abs(h[np.isfinite(h)]).max(initial=0.0))


def agree(got: torch.Tensor, want: np.ndarray, dtype: torch.dtype, scale: float = 1.0):
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double().numpy(), want, rtol=RELATIVE[dtype], atol=16 * EPS * scale)


def test_agrees_with_the_definitions(case, oracle):
    states, mask = case.states, case.mask
    h, groups, dtype = oracle.upcast(states), oracle.token_groups(states, mask), map_dtype(states)
    got = depth_statistics(states, mask)
    agree(got.norm, oracle.norms(h, groups), dtype, 0.0)
    agree(got.adjacent_cosine, oracle.adjacent_cosine(h, groups), dtype)
    agree(got.adjacent_distance, 1 - oracle.adjacent_cosine(h, groups), dtype)
    agree(got.curvature, oracle.curvature(h, groups), dtype, largest(h))
    agree(got.spread, oracle.spread(h, groups), dtype, largest(h))
    for counts, condition in (
        (got.nonfinite, lambda x: not oracle.is_finite(x)),
        (got.zero, lambda x: not x.any()),
    ):
        assert counts.dtype == torch.int64
        assert counts.tolist() == oracle.tokens_where(h, groups, condition)


def test_a_hand_worked_token():
    states = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0], [0.0, -6.0]]).view(4, 1, 1, 2)
    got = depth_statistics(states)
    assert got.norm.flatten().tolist() == [5, 5, 0, 6]
    assert got.adjacent_cosine.flatten().tolist() == pytest.approx([24 / 25, np.nan, np.nan], nan_ok=True)
    assert got.adjacent_distance.flatten().tolist() == pytest.approx([1 / 25, np.nan, np.nan], nan_ok=True)
    # |(4, 3) − (1.5, 2)| = (2.5, 1) and |(0, 0) − (2, −1.5)| = (2, 1.5)
    assert got.curvature.flatten().tolist() == [1.75, 1.75]
    # Variances of (3, 4, 0, 0) and (4, 3, 0, −6): 25/4 − (7/4)² and 61/4 − (1/4)².
    assert got.spread.item() == pytest.approx(((25 / 4 - 49 / 16) ** 0.5 + (61 / 4 - 1 / 16) ** 0.5) / 2)
    assert got.zero.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("turn", [1e-1, 1e-2, 2.5e-3, 1e-5])
def test_a_small_turn_is_not_lost_to_cancellation(turn: float):
    """1 − cos = 2 sin²(θ/2) of a token turned by θ, where 1 − cos in float32 keeps nothing."""
    angle = torch.tensor([0.0, turn], dtype=torch.float64)
    states = torch.stack([angle.cos(), angle.sin()], dim=-1).view(2, 1, 1, 2)
    got = depth_statistics(states).adjacent_distance.item()
    assert got == pytest.approx(2 * np.sin(turn / 2) ** 2, rel=1e-9)
    single = depth_statistics(states.float()).adjacent_distance.item()
    # The input's rounding moves the angle by up to 2⁻²⁴, which 1 − cos ≈ θ²/2 doubles.
    assert single == pytest.approx(2 * np.sin(turn / 2) ** 2, rel=2 * 2.0**-23 / turn + 1e-6)


def test_a_common_offset_does_not_hide_the_spread():
    """Plain E[x²] − E[x]² would be wrong by 1e5 here, in float32 it would be anything."""
    offset = 1e8
    states = (torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) + offset).view(4, 1, 1, 1)
    assert depth_statistics(states).spread.item() == pytest.approx(1.25**0.5, rel=1e-12)


def test_two_states_have_no_curvature_but_a_spread():
    got = depth_statistics(torch.tensor([1.0, 5.0]).view(2, 1, 1, 1))
    assert got.curvature.shape == (0, 1, 1)
    assert got.spread.item() == 2


def test_neighbours_of_a_nonfinite_token_count_where_they_are_alone():
    states = torch.randn(6, 1, 2, 4)
    states[2, 0, 1, 3] = torch.inf
    got = depth_statistics(states)
    assert got.norm[:, 0, 1].isnan().tolist() == [False, False, True, False, False, False]
    assert got.adjacent_cosine[:, 0, 1].isnan().tolist() == [False, True, True, False, False]
    assert got.curvature[:, 0, 1].isnan().tolist() == [True, True, True, False]
    assert got.spread.isnan().tolist() == [[False, True]]
    assert not any(entry[..., 0].isnan().any() for entry in got[:5])
    assert got.nonfinite.tolist() == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("shape", [(3, 0, 4, 2), (3, 2, 0, 2)])
def test_an_empty_batch_gives_empty_maps(shape: tuple[int, ...]):
    got = depth_statistics(torch.ones(shape))
    assert got.norm.shape == shape[:3]
    assert got.curvature.shape == (1, *shape[1:3])
    assert got.nonfinite.tolist() == [0, 0, 0]
