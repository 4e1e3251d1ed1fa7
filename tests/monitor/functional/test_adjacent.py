"""Adjacent-layer similarity against a loop over tokens, and its laws."""

import numpy as np
import pytest
import torch

from repflow.monitor.functional import adjacent_layer_similarity

# METRICS: cosines agree with float64 to 1e-5 absolute, for bfloat16 inputs too, since upcasting is exact.
ABSOLUTE = 1e-5


def test_agrees_with_the_definition(case, oracle):
    states, mask = case.states, case.mask
    want = oracle.adjacent_cosine(oracle.upcast(states), oracle.token_groups(states, mask))
    got = adjacent_layer_similarity(states, mask)
    assert got.dtype == (torch.float64 if states.dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=ABSOLUTE)


def test_a_small_turn_in_bfloat16_is_measured():
    """A cosine computed in bfloat16 has 8 bits, and would say 1 here or 1e-2 less."""
    token = torch.ones(64)
    turned = token.clone()
    turned[0] += 2.0**-3
    got = adjacent_layer_similarity(torch.stack([token, turned]).bfloat16().view(2, 1, 1, 64))
    exact = (64 + 2.0**-3) / (64 * (63 + 1.125**2)) ** 0.5
    assert 1 - exact == pytest.approx(1.2e-4, rel=0.02)
    assert got.item() == pytest.approx(exact, abs=1e-7)


def test_equal_states_give_one_and_opposite_ones_minus_one():
    state = torch.randn(1, 2, 5, 33)
    got = adjacent_layer_similarity(torch.cat([state, 3 * state, -state]))
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0]).view(2, 1, 1).expand(2, 2, 5), rtol=0, atol=2.0**-23)


def test_the_map_follows_its_tokens():
    states, order = torch.randn(3, 2, 7, 5), torch.randperm(7)
    got, want = adjacent_layer_similarity(states[:, :, order]), adjacent_layer_similarity(states)[:, :, order]
    torch.testing.assert_close(got, want, rtol=0, atol=2.0**-23)


def test_padding_is_nan_and_leaves_the_rest_alone():
    states, mask = torch.randn(3, 2, 7, 5), torch.rand(2, 7) < 0.5
    got, whole = adjacent_layer_similarity(states, mask), adjacent_layer_similarity(states)
    assert torch.equal(got.isnan(), ~mask.expand(2, -1, -1))
    assert torch.equal(got[:, mask], whole[:, mask])
