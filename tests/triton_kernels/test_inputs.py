"""Every refusal names the function, what it expected, what came, and where it can, what to do."""

import re

import numpy as np
import pytest
import torch

from repflow.triton_kernels import depth_statistics, hsic_statistics, pairwise_hsic, token_sums

FUNCTIONS = (depth_statistics, token_sums, hsic_statistics, pairwise_hsic)
STATES = torch.ones(3, 2, 4, 5)

BAD_STATES = (
    ([torch.ones(2, 4, 5)], TypeError, ["one tensor of states [S, B, T, D]", "got list", "torch.stack"]),
    (np.ones((3, 2, 4, 5)), TypeError, ["one tensor of states", "got ndarray"]),
    (STATES.long(), TypeError, ["float16, bfloat16, float32 or float64", "got torch.int64"]),
    (STATES.to(torch.complex64), TypeError, ["float64", "got torch.complex64"]),
    (STATES[0], ValueError, ["shape [S, B, T, D]", "got (2, 4, 5)"]),
    (STATES[:0], ValueError, ["at least", "got 0"]),
    (STATES[..., :0], ValueError, ["at least one feature", "got shape (3, 2, 4, 0)"]),
)
BAD_MASKS = (
    (torch.ones(2, 4), TypeError, ["boolean or integer mask", "0 is padding", "got torch.float32"]),
    (torch.ones(2, 4, dtype=torch.complex64), TypeError, ["boolean or integer mask", "got torch.complex64"]),
    (np.ones((2, 4), dtype=bool), TypeError, ["boolean or integer mask", "got ndarray"]),
    ([[True] * 4] * 2, TypeError, ["boolean or integer mask", "got list"]),
    (torch.ones(4, 2, dtype=torch.bool), ValueError, ["[B, T] = [2, 4]", "got [4, 2]"]),
    (torch.ones(2, 1, 4, dtype=torch.bool), ValueError, ["[B, T] = [2, 4]", "got [2, 1, 4]"]),
    (torch.tensor([[1, 1, 1, 0], [2, 2, -1, -1]]), ValueError, ["from 0 (padding) up", "got -1"]),
    (torch.ones(2, 4, dtype=torch.bool, device="meta"), ValueError, ["are on cpu and the mask on meta", "move"]),
)


def refused(function, error: type[Exception], *args, **options) -> str:
    with pytest.raises(error) as raised:
        function(*args, **options)
    assert type(raised.value) is error
    message = str(raised.value)
    assert re.match(f"`{function.__name__}`: ", message), message
    return message


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("states", "error", "parts"), BAD_STATES)
def test_states(function, states, error, parts):
    message = refused(function, error, states)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("mask", "error", "parts"), BAD_MASKS)
def test_masks(function, mask, error, parts):
    message = refused(function, error, STATES, mask)
    assert all(part in message for part in parts), message


def test_depth_needs_two_states():
    message = refused(depth_statistics, ValueError, STATES[:1])
    assert "at least 2 states" in message and "got 1" in message


@pytest.mark.parametrize("function", [hsic_statistics, pairwise_hsic])
@pytest.mark.parametrize("estimator", ["Unbiased", "debiased", "", None])
def test_estimators(function, estimator):
    message = refused(function, ValueError, STATES, estimator=estimator)
    assert f'"unbiased" or "biased", got {estimator!r}' in message
