"""The pure functions refuse what the kernels refuse, with an error that names a public function and what came."""

import inspect
import re

import pytest
import torch

from repflow import triton_kernels
from repflow.monitor import functional

FUNCTIONS = [getattr(functional, name) for name in functional.__all__]
STATES = torch.ones(3, 2, 4, 5)


def refused(function, error: type[Exception], *args, **options) -> str:
    # Unwrapped: the check of annotated shapes, which tests alone have, would come first.
    with pytest.raises(error) as raised:
        inspect.unwrap(function)(*args, **options)
    assert type(raised.value) is error
    message = str(raised.value)
    named = re.match("`([a-z_]+)`: expected ", message)
    assert named and named[1] in (*functional.__all__, *triton_kernels.__all__), message
    return message


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_states(function):
    assert "got list" in refused(function, TypeError, list(STATES))
    assert "got torch.int64" in refused(function, TypeError, STATES.long())
    assert "[S, B, T, D], got (2, 4, 5)" in refused(function, ValueError, STATES[0])
    assert "got 0" in refused(function, ValueError, STATES[:0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_masks(function):
    assert "got torch.float32" in refused(function, TypeError, STATES, torch.ones(2, 4))
    wrong = refused(function, ValueError, STATES, torch.ones(4, 2).bool())
    assert "[2, 4] as in states [3, 2, 4, 5], got [4, 2]" in wrong
    assert "got -1" in refused(function, ValueError, STATES, -torch.ones(2, 4).long())


@pytest.mark.parametrize(
    "function",
    [functional.adjacent_layer_similarity, functional.layer_local_variance, functional.layer_global_variance],
)
def test_one_state_has_no_depth(function):
    assert "at least 2 states" in refused(function, ValueError, STATES[:1])


def test_an_unknown_estimator():
    message = refused(functional.layer_cka, ValueError, STATES, estimator="debiased")
    assert message.endswith("""expected estimator="unbiased" or "biased", got 'debiased'""")
