"""The harness itself: memory that was never written shows, and annotated shapes are checked where they should be."""

from types import ModuleType

import pytest
import torch
from jaxtyping import TypeCheckError

from repflow.monitor.functional import cka
from repflow.triton_kernels import reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_unwritten_floats_are_nan(dtype: torch.dtype):
    like = torch.ones(3, 4, dtype=dtype)
    fresh = [torch.empty(1000, dtype=dtype), torch.empty_like(like), like.new_empty(7), torch.empty(2).resize_(50)]
    assert all(tensor.isnan().all() for tensor in fresh)


def test_unwritten_integers_are_no_plausible_count():
    assert (torch.empty(1000, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_a_wrong_shape_in_the_monitor_is_refused():
    with pytest.raises(TypeCheckError, match="cka_from_hsic"):
        cka.cka_from_hsic(torch.ones(3))


def test_kernels_are_not_wrapped():
    assert is_checked(cka)
    assert not is_checked(reference)


def is_checked(module: ModuleType) -> bool:
    """Whether jaxtyping's import hook loaded the module, and so decorated its functions."""
    return type(module.__loader__).__module__.startswith("jaxtyping")
