"""The Triton kernels behind `depth_statistics`, through Triton's interpreter where there is no GPU."""

import pytest
import torch

from repflow.triton_kernels import depth_statistics
from repflow.triton_kernels._dispatch import force, use_triton
from repflow.triton_kernels._stream import choose_settings
from tests.triton_kernels.close import assert_depth

SINGLE = ("float16", "bfloat16", "float32")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter


def both(states, mask):
    with force("triton"):
        assert use_triton(states)
        got = depth_statistics(states, mask)
    with force("reference"):
        return got, depth_statistics(states, mask)


def test_agrees_with_the_reference(case):
    with force("triton"):
        if not use_triton(case.states):
            return  # other tests cover what goes to the reference
    assert_depth(*both(case.states, case.mask), case.states)


@pytest.mark.parametrize("dtype", SINGLE)
@pytest.mark.parametrize("shape", [(2, 1, 1, 64), (4, 2, 3, 63), (3, 1, 65, 200), (2, 1, 2, 1000)], ids=str)
def test_odd_sizes(shape, dtype, cases):
    states = cases.Case(getattr(torch, dtype), shape, cases.mask_right).states
    assert_depth(*both(states, cases.mask_right(*shape[1:3])), states)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("turn", [3e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("stretch", [1.0, 1.5, 40.0])
def test_small_turns_of_long_and_short_vectors(scale, turn, stretch):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 4, 100, generator=generator)
    second = stretch * (first + turn * torch.randn(1, 4, 100, generator=generator))
    states = torch.stack([first, second, first]) * scale
    assert_depth(*both(states, None), states)


@pytest.mark.parametrize("align", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_thread_holds_two_features_of_a_token(dtype, align):
    """Or else its product would be contracted with the sum over the warp, and threads would differ in the last bit."""
    vector = min(align, 16 // dtype.itemsize)
    for features in (*range(1, 300), 768, 1000, 2500, 2560, 4096):
        pieces, _, width = choose_settings(dtype, features, vector).walk
        assert pieces * width // min(32, width // min(vector, width)) >= 2, features


def test_the_same_bits_every_time(cases):
    states = cases.Case(torch.bfloat16, (4, 2, 40, 130)).states
    with force("triton"):
        first, again = depth_statistics(states), depth_statistics(states)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, again, strict=True))
