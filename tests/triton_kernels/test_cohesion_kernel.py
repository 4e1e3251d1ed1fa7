"""The Triton kernels behind `token_sums`, through Triton's interpreter where there is no GPU."""

import pytest
import torch

from repflow.triton_kernels import depth_and_token_sums, depth_statistics, token_sums
from repflow.triton_kernels._dispatch import force, use_triton
from tests.triton_kernels.close import assert_depth, assert_sums

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter


def both(states, mask):
    with force("triton"):
        assert use_triton(states)
        got = token_sums(states, mask)
    with force("reference"):
        return got, token_sums(states, mask)


def test_agrees_with_the_reference(flat_case):
    with force("triton"):
        if not use_triton(flat_case.states):
            return  # other tests cover what goes to the reference
    assert_sums(*both(flat_case.states, flat_case.mask))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (5, 2, 3, 63), (2, 1, 300, 20), (2, 1, 2, 1000)], ids=str)
@pytest.mark.parametrize("mask", ["mask_none", "mask_right", "mask_documents"])
def test_odd_sizes(shape, dtype, mask, cases):
    """300 tokens are more than one chunk."""
    case = cases.Case(getattr(torch, dtype), shape, getattr(cases, mask))
    assert_sums(*both(case.states, case.mask))


@pytest.mark.parametrize("documents", [False, True])
def test_a_mask_that_lies_in_memory_otherwise(documents, cases):
    states = cases.Case(torch.float32, (3, 2, 9, 16)).states
    mask = (torch.arange(18).view(9, 2) % 5 != 0).long()
    mask = (mask * (1 + torch.arange(9).unsqueeze(1) // 4) if documents else mask).T
    assert_sums(*both(states, mask))
    with force("triton"):
        got = depth_statistics(states, mask)
    with force("reference"):
        assert_depth(got, depth_statistics(states, mask), states)


@pytest.mark.parametrize("scale", [1e-33, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lengths_beyond_float32(scale, dtype, cases):
    """No bfloat16 is denormal here: Triton's interpreter widens those wrongly."""
    states = (cases.Case(torch.float32, (5, 2, 7, 40)).states * scale).to(dtype)
    states[:, 0, 2] = 1
    assert_sums(*both(states, None))


def test_the_same_bits_every_time(cases):
    states = cases.Case(torch.bfloat16, (4, 2, 40, 130)).states
    with force("triton"):
        first, again = token_sums(states), token_sums(states)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_together_they_are_the_same(implementation, cases):
    case = cases.Case(torch.bfloat16, (4, 2, 20, 70), cases.mask_right, cases.fault_nan_feature)
    with force(implementation):
        depth, sums = depth_and_token_sums(case.states, case.mask)
        alone = depth_statistics(case.states, case.mask), token_sums(case.states, case.mask)
    for one, other in zip(depth + sums, alone[0] + alone[1], strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
