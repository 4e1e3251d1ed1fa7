"""What goes to the kernels, and what to the reference."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from repflow.triton_kernels import (
    _dispatch,
    depth_and_token_sums,
    depth_statistics,
    hsic_statistics,
    pairwise_hsic,
    token_sums,
)
from repflow.triton_kernels._dispatch import force, use_triton

FUNCTIONS = (depth_statistics, token_sums, depth_and_token_sums, hsic_statistics, pairwise_hsic)
STATES = torch.ones(2, 1, 3, 4)
GPU = torch.device("cuda:0")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if there were an H200: what is asked of PyTorch about it."""
    _dispatch._takes.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield monkeypatch
    _dispatch._takes.cache_clear()


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


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [leaf for entry in result for leaf in flat(entry)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "change",
    [
        lambda states: states.double(),
        lambda states: states.mT.contiguous().mT,
        lambda states: states.repeat_interleave(2, -1)[..., ::2],
    ],
    ids=["float64", "features_first", "every_second_feature"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_what_kernels_do_not_take_is_computed_all_the_same(function, change):
    states = torch.randn(3, 2, 6, 5)
    with force("triton"):
        assert use_triton(states) and not use_triton(change(states))
        kernels, other = function(states), function(change(states))
    with force("reference"):
        want = function(states)
    for one, two, three in zip(flat(kernels), flat(other), flat(want), strict=True):
        torch.testing.assert_close(one.double(), three.double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(two.double(), three.double(), rtol=1e-6, atol=1e-6)


def test_a_recent_gpu_runs_the_kernels(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch._takes(GPU)


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        (torch.cuda, "get_device_capability", lambda device: (7, 5), "compute capability 8.0, and this GPU has 7.5"),
        (torch.version, "hip", "6.4.0", "an NVIDIA GPU, and this is a build of PyTorch for AMD's"),
        (_dispatch, "_installed", False, "the package triton, which is not installed"),
    ],
)
def test_a_gpu_without_kernels_is_named_once(where, name, value, said, gpu):
    gpu.setattr(where, name, value)
    with pytest.warns(RuntimeWarning, match=f"plain PyTorch on cuda:0, .* they need {said}"):
        assert not _dispatch._takes(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _dispatch._takes(GPU)
