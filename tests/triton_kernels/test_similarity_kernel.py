"""The Triton kernels behind `similarity_gradient`, through Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch import Tensor

from repflow.triton_kernels import similarity_gradient
from repflow.triton_kernels._dispatch import force, use_triton
from repflow.triton_kernels.groups import Groups, find_groups
from tests.triton_kernels.close import assert_similarity_gradient

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter


def check(state: Tensor, mask: Tensor | Groups | None, **options) -> None:
    with force("triton"):
        assert use_triton(state.unsqueeze(0))
        got = similarity_gradient(state, mask, **options)
    with force("reference"):
        assert_similarity_gradient(got, similarity_gradient(state, mask, **options), state, mask, **options)


def test_agrees_with_the_reference(flat_case):
    states, mask = flat_case.states, flat_case.mask
    with force("triton"):
        if not use_triton(states):
            return  # other tests cover what goes to the reference
    state = states[-1]
    check(state, mask, onto=torch.randn(state.shape).to(state.dtype), weight=0.3, target=-0.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 3, 63), (1, 300, 20), (1, 2, 1000), (2, 5, 2500)], ids=str)
def test_odd_sizes(shape, dtype, cases):
    """300 tokens are more than one piece, 2500 features more than one warp."""
    case = cases.Case(getattr(torch, dtype), (1, *shape), cases.mask_right)
    check(case.states[0], None)
    check(case.states[0], case.mask)
    check(case.states[0], cases.mask_documents(*shape[:2]))


@pytest.mark.parametrize("scale", [1e-38, 1e-33, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lengths_beyond_float32(scale, dtype, cases):
    """No bfloat16 is denormal here: Triton's interpreter widens those wrongly."""
    state = (cases.Case(torch.float32, (1, 2, 7, 40)).states[0].double() * scale).to(dtype)
    state[state.abs() < 1.2e-38] = 0
    state[:, 2] = 1
    check(state, None, weight=scale)


@pytest.mark.parametrize("documents", [False, True])
def test_masks_and_gradients_that_lie_in_memory_otherwise(documents, cases):
    state = cases.Case(torch.float32, (1, 2, 9, 16)).states[0]
    mask = (torch.arange(18).view(9, 2) % 5 != 0).long()
    mask = (mask * (1 + torch.arange(9).unsqueeze(1) // 4) if documents else mask).T
    for onto in (torch.randn(9, 2, 16).transpose(0, 1), torch.ones(()).expand(2, 9, 16), torch.randn(2, 16, 9).mT):
        check(state, mask, onto=onto)
    check(state.transpose(0, 1).contiguous().transpose(0, 1), mask)


def test_groups_with_room(cases):
    """Where the number of documents is unknown: room for two more than there are, and for too few."""
    case = cases.Case(torch.bfloat16, (1, 2, 20, 24), cases.mask_documents)
    count = find_groups(case.mask).count
    for room in (count + 2, count - 2):
        groups = find_groups(case.mask, room)
        check(case.states[0], groups)
        assert groups.found is not None and int(groups.found) == count


@pytest.mark.parametrize("inactive", [{"weight": 0.0}, {"target": 1.0}], ids=str)
def test_without_a_term_not_a_bit_changes(inactive, cases):
    state = cases.Case(torch.float32, (1, 2, 6, 4)).states[0]
    onto = torch.randn(state.shape)
    onto[0, 0] = torch.tensor([-0.0, 0.0, torch.inf, torch.nan])
    with force("triton"):
        got = similarity_gradient(state, onto=onto, **inactive)
    assert torch.equal(got.gradient.view(torch.int32), onto.view(torch.int32)) and float(got.added_square) == 0


def test_the_same_bits_every_time(cases):
    state = cases.Case(torch.bfloat16, (1, 2, 40, 130)).states[0]
    onto = torch.randn(state.shape).bfloat16()
    with force("triton"):
        first, again = (similarity_gradient(state, onto=onto) for _ in range(2))
    assert all(map(torch.equal, first, again))
