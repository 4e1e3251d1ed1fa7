"""CKA against Gram matrices written out, its laws, and its traps."""

import numpy as np
import pytest
import torch
from torch import Tensor

from repflow.monitor.functional import layer_cka
from repflow.triton_kernels import hsic_statistics

# METRICS: 1e-4 absolute for float32, 2e-3 for bfloat16, also under a constant offset of 100 σ on two features. float16
# has three bits more than bfloat16, and is held to what float32 is; float64 too.
ABSOLUTE = {torch.bfloat16: 2e-3, torch.float16: 1e-4, torch.float32: 1e-4, torch.float64: 1e-4}
ESTIMATORS = ("unbiased", "biased")


def assert_cka(got: Tensor, want: Tensor, absolute: float = 1e-10):
    torch.testing.assert_close(got, want, rtol=0, atol=absolute, equal_nan=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_agrees_with_the_definition(flat_case, estimator, oracle):
    states, mask = flat_case.states, flat_case.mask
    want = oracle.cka(oracle.upcast(states), oracle.token_groups(states, mask), estimator)
    got = layer_cka(states, mask, estimator=estimator)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=ABSOLUTE[states.dtype])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", list(ABSOLUTE), ids=str)
def test_every_state_is_like_itself(dtype: torch.dtype, estimator):
    got = layer_cka(torch.randn(4, 3, 11, 5).to(dtype), estimator=estimator)
    assert_cka(got.diagonal(dim1=1, dim2=2), torch.ones(3, 4, dtype=torch.float64), 1e-14)
    assert_cka(got, got.mT, 1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rotation_scale_and_shift_of_a_state_do_not_matter(estimator):
    states = torch.randn(3, 2, 12, 7, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(3, 1, 7, 7, dtype=torch.float64))
    scale = torch.tensor([1e-6, 3.0, 1e6], dtype=torch.float64).view(3, 1, 1, 1)
    moved = (states @ rotation + 10 * torch.randn(3, 2, 1, 7, dtype=torch.float64)) * scale
    assert_cka(layer_cka(moved, estimator=estimator), layer_cka(states, estimator=estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_copy_turned_scaled_and_shifted_is_the_same_geometry(estimator):
    state = torch.randn(1, 10, 6, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    got = layer_cka(torch.stack([state, 5 - 3 * state @ rotation]), estimator=estimator)
    assert_cka(got, torch.ones(1, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_order_and_padding_of_tokens_do_not_matter(estimator):
    states = torch.randn(3, 2, 9, 5)
    want = layer_cka(states, estimator=estimator)
    assert_cka(layer_cka(states[:, :, torch.randperm(9)], estimator=estimator), want)
    padded = torch.full((3, 2, 14, 5), 1e4)
    padded[:, :, 4:13] = states
    mask = torch.zeros(2, 14, dtype=torch.long)
    mask[:, 4:13] = 1
    assert_cka(layer_cka(padded, mask, estimator=estimator), want)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_packing_documents_into_rows_changes_only_where_they_are(estimator):
    documents = [torch.randn(2, 1, n, 5) for n in (5, 4, 7)]
    packed = torch.cat(documents, dim=2)
    numbers = torch.tensor([[2] * 5 + [3] * 4 + [9] * 7])
    want = torch.cat([layer_cka(document, estimator=estimator) for document in documents])
    assert_cka(layer_cka(packed, numbers, estimator=estimator), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_offset_of_100_sigma_does_not_matter(dtype: torch.dtype, oracle):
    """The offset is rounded into the inputs, so the truth is that of the rounded inputs."""
    states = torch.randn(3, 2, 63, 64).cumsum(0)
    states[..., 3] += 100
    states[..., 40] -= 100
    states = states.to(dtype)
    for estimator in ESTIMATORS:
        want = oracle.cka(oracle.upcast(states), oracle.token_groups(states, None), estimator)
        np.testing.assert_allclose(layer_cka(states, estimator=estimator), want, rtol=0, atol=ABSOLUTE[dtype])


@pytest.mark.parametrize("tokens", [4, 5, 8, 63])
def test_unbiased_values_stay_within_one_and_are_not_clamped_at_zero(tokens: int):
    """The unbiased HSIC is an inner product of centred Grams, so Cauchy and Schwarz hold for it."""
    got = layer_cka(torch.randn(6, 50, tokens, 3))
    assert got.abs().max() <= 1 + 1e-10
    assert (got < 0).any()


def test_few_tokens_may_look_opposed():
    """Four tokens paired up in two different ways: −1/2. Paired one way here, and both other ways there: −1."""
    first = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    second = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    got = layer_cka(torch.stack([first, second]).unsqueeze(1))
    assert_cka(got, torch.tensor([[[1.0, -0.5], [-0.5, 1.0]]], dtype=torch.float64), 1e-14)
    third = torch.tensor([[1.0], [-1.0], [-1.0], [1.0]])
    got = layer_cka(torch.stack([torch.cat([first, second], dim=1), third.expand(4, 2)]).unsqueeze(1))
    assert_cka(got, torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", list(ABSOLUTE), ids=str)
@pytest.mark.parametrize("tokens", [4, 63, 1000])
def test_collapsed_states_give_nan(tokens: int, dtype: torch.dtype, estimator):
    """All tokens equal: what is left after centring is rounding, which must not look like a geometry."""
    states = torch.randn(3, 1, tokens, 5, dtype=torch.float64)
    states[1] = torch.tensor([0.1, 1 / 3, 7.7, -1e-3, 123.456], dtype=torch.float64)
    got = layer_cka(states.to(dtype), estimator=estimator)[0]
    assert got[1].isnan().all() and got[:, 1].isnan().all()
    assert got[[0, 0, 2, 2], [0, 2, 0, 2]].isfinite().all()


def test_a_single_token_apart_has_no_unbiased_geometry():
    """The unbiased self-HSIC is exactly 0 there: no two other tokens are told apart. The biased one sees the token."""
    states = torch.ones(2, 1, 6, 3)
    states[0, 0, 2] = torch.tensor([5.0, -3.0, 0.3])
    states[1] = torch.randn(1, 6, 3)
    assert layer_cka(states)[0].isnan().tolist() == [[True, True], [True, False]]
    assert layer_cka(states, estimator="biased")[0, 0, 0].item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(("estimator", "least"), [("unbiased", 4), ("biased", 2)])
def test_too_few_tokens_give_nan(estimator, least: int):
    mask = torch.arange(5) < torch.arange(6).unsqueeze(1)
    got = layer_cka(torch.randn(2, 6, 5, 3), mask, estimator=estimator)
    assert got.isnan().flatten(1).all(1).tolist() == [n < least for n in range(6)]
    assert got.isnan().flatten(1).any(1).tolist() == [n < least for n in range(6)]


def test_two_tokens_are_always_alike_to_the_biased_estimator():
    assert_cka(layer_cka(torch.randn(4, 2, 2, 3), estimator="biased"), torch.ones(2, 4, 4, dtype=torch.float64))


def test_one_token_can_own_cka(oracle):
    """METRICS: equal in 254 of 256 features, plus one sink of 1000 on two: unbiased .054, biased .9995; else .993, .995

    The unbiased value with the sink hangs on the draw of 512 tokens (standard deviation .02), the others do not.
    """
    states = torch.randn(2, 1, 512, 256)
    states[1, ..., 2:] = states[0, ..., 2:]
    sink = states.clone()
    sink[:, :, 0, :2] = 1000
    plain, owned = [
        {name: layer_cka(x, estimator=name)[0, 0, 1].item() for name in ESTIMATORS} for x in (states[:, :, 1:], sink)
    ]
    assert plain["unbiased"] == pytest.approx(0.993, abs=2e-3)
    assert plain["biased"] == pytest.approx(0.995, abs=2e-3)
    assert owned["unbiased"] == pytest.approx(0.054, abs=0.05)
    assert owned["biased"] == pytest.approx(0.9995, abs=1e-4)
    h, groups = oracle.upcast(sink), oracle.token_groups(sink, None)
    for name in ESTIMATORS:
        assert owned[name] == pytest.approx(oracle.cka(h, groups, name)[0, 0, 1], abs=1e-4)
    moments = hsic_statistics(sink)
    assert (moments.fourth_moment_max / moments.fourth_moment).min() > 0.99
