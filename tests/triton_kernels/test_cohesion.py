"""`token_sums` against loops over tokens."""

import numpy as np
import pytest
import torch

from repflow.triton_kernels import token_sums

# Every entry is a float64 sum of at most 126 numbers of at most 1.
ABSOLUTE = 1e-13


def test_agrees_with_the_definitions(flat_case, oracle):
    states, mask = flat_case.states, flat_case.mask
    h, groups = oracle.upcast(states), oracle.token_groups(states, mask)
    got = token_sums(states, mask)
    for sums, count, vectors in (
        (got.unit_sum, got.count, h),
        (got.update_unit_sum, got.update_count, oracle.updates(h)),
    ):
        want, want_count = oracle.unit_sum(vectors, groups)
        assert (sums.dtype, count.dtype) == (torch.float64, torch.int64)
        np.testing.assert_array_equal(count.numpy(), want_count)
        np.testing.assert_allclose(sums.numpy(), want, rtol=0, atol=ABSOLUTE)


def test_hand_worked_sums():
    first = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    second = torch.tensor([[3.0, 4.0], [5.0, 0.0], [torch.nan, 1.0]])
    got = token_sums(torch.stack([first, second]).unsqueeze(1))
    assert got.unit_sum.tolist() == [[pytest.approx([0.6, -0.2])], [pytest.approx([1.6, 0.8])]]
    assert got.count.tolist() == [[2], [2]]
    # The first token does not move, the last moves to no one knows where.
    assert got.update_unit_sum.tolist() == [[[1, 0]]]
    assert got.update_count.tolist() == [[1]]


def test_infinities_of_either_sign_have_no_direction():
    states = torch.ones(3, 1, 2, 2)
    states[0, 0, 0, 0], states[1, 0, 0, 0] = torch.inf, -torch.inf
    got = token_sums(states)
    assert got.count.tolist() == [[1], [1], [2]]
    assert got.update_count.tolist() == [[0], [0]]
    assert got.unit_sum.isfinite().all() and not got.update_unit_sum.any()


def test_an_empty_batch_has_no_groups():
    got = token_sums(torch.ones(2, 0, 4, 3))
    assert got.unit_sum.shape == (2, 0, 3)
    assert got.update_count.shape == (1, 0)
    assert token_sums(torch.ones(2, 3, 0, 3)).count.tolist() == [[0, 0, 0]] * 2
