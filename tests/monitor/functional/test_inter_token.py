"""Eq. 2 against a loop over pairs, and its laws."""

import numpy as np
import pytest
import torch

from repflow.monitor.functional import inter_token_similarity

# METRICS: cosines agree with float64 to 1e-5 absolute, for bfloat16 inputs too, since upcasting is exact.
ABSOLUTE = 1e-5


def test_agrees_with_the_mean_over_pairs(flat_case, oracle):
    states, mask = flat_case.states, flat_case.mask
    want = oracle.inter_token(oracle.upcast(states), oracle.token_groups(states, mask))
    got = inter_token_similarity(states, mask)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=ABSOLUTE)


def test_three_hand_worked_tokens():
    """Right angle, 45° and 45°: (0 + √½ + √½)/3."""
    states = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 5.0]]).view(1, 1, 3, 2)
    assert inter_token_similarity(states).item() == pytest.approx(2 * 0.5**0.5 / 3, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_equal_tokens_give_one(dtype: torch.dtype):
    states = torch.randn(3, 2, 1, 65).to(dtype).expand(3, 2, 33, 65)
    # ‖Σu‖² of 33 unit vectors, rounded in float64.
    one = torch.ones(3, 2, dtype=torch.float64)
    torch.testing.assert_close(inter_token_similarity(states), one, rtol=0, atol=1e-13)


def test_lengths_of_tokens_do_not_matter():
    states = torch.randn(2, 3, 9, 5, dtype=torch.float64)
    scaled = states * torch.logspace(-20, 20, 9, dtype=torch.float64).view(1, 1, 9, 1)
    torch.testing.assert_close(inter_token_similarity(scaled), inter_token_similarity(states), rtol=0, atol=1e-13)


def test_opposite_tokens_give_the_smallest_value():
    """n unit vectors that sum to zero: −1/(n − 1)."""
    half = torch.randn(1, 1, 4, 6)
    states = torch.cat([half, -half], dim=2)
    assert inter_token_similarity(states).item() == pytest.approx(-1 / 7, abs=1e-12)


@pytest.mark.parametrize("tokens", [0, 1])
def test_fewer_than_two_tokens_give_nan(tokens: int):
    mask = torch.arange(5).expand(2, -1) < torch.tensor([[tokens], [5]])
    got = inter_token_similarity(torch.randn(3, 2, 5, 4), mask)
    assert got.isnan().tolist() == [[True, False]] * 3


def test_tokens_without_direction_are_left_out_of_their_state_alone():
    states = torch.randn(4, 1, 6, 5)
    states[1, 0, 2] = 0
    states[2, 0, 4, 1] = torch.nan
    states[3, 0, 1:] = torch.inf
    got = inter_token_similarity(states)[:, 0]
    kept = ([0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 5])
    want = [inter_token_similarity(states[layer, :, tokens].unsqueeze(0)).item() for layer, tokens in enumerate(kept)]
    assert got.tolist() == pytest.approx([*want, np.nan], abs=1e-13, nan_ok=True)


def test_order_and_padding_of_tokens_do_not_matter():
    states = torch.randn(3, 2, 9, 5)
    want = inter_token_similarity(states)
    torch.testing.assert_close(inter_token_similarity(states[:, :, torch.randperm(9)]), want, rtol=0, atol=1e-13)
    padded = torch.full((3, 2, 14, 5), 3.0)
    padded[:, :, 2:11] = states
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[:, 2:11] = True
    torch.testing.assert_close(inter_token_similarity(padded, mask), want, rtol=0, atol=1e-13)


def test_packing_documents_into_rows_changes_only_where_they_are():
    documents = [torch.randn(3, 1, n, 5) for n in (4, 2, 6)]
    packed = torch.cat([*documents, torch.ones(3, 1, 2, 5)], dim=2)
    numbers = torch.tensor([[1] * 4 + [3] * 2 + [4] * 6 + [0] * 2])
    want = torch.cat([inter_token_similarity(document) for document in documents], dim=1)
    torch.testing.assert_close(inter_token_similarity(packed, numbers), want, rtol=0, atol=1e-13)
