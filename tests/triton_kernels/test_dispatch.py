"""What goes to the kernels, and what to the reference."""

import pytest
import torch

from repflow.triton_kernels._dispatch import force, use_triton

STATES = torch.ones(2, 1, 3, 4)


def test_a_cpu_goes_to_the_reference():
    assert not use_triton(STATES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_forced_the_device_does_not_matter(dtype):
    with force("triton"):
        assert use_triton(STATES.to(dtype))
        with force("reference"):
            assert not use_triton(STATES.to(dtype))
        assert use_triton(STATES.to(dtype))
    assert not use_triton(STATES.to(dtype))


@pytest.mark.parametrize(
    "states", [STATES.double(), STATES[:, :0], STATES.mT, STATES[..., ::2], STATES[..., :1].expand(-1, -1, -1, 4)]
)
def test_what_kernels_do_not_take_goes_to_the_reference_all_the_same(states):
    with force("triton"):
        assert not use_triton(states)


def test_one_feature_is_contiguous_whatever_its_stride():
    with force("triton"):
        assert use_triton(STATES[..., ::4])


def test_the_override_ends_with_an_exception():
    with pytest.raises(KeyError), force("triton"):
        raise KeyError
    assert not use_triton(STATES)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match='expected "triton" or "reference", got \'cuda\''), force("cuda"):  # pyright: ignore
        pass
