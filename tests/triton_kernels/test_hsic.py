"""`pairwise_hsic` and `hsic_statistics` against Gram matrices with centring matrices and zero diagonals written out."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from repflow.triton_kernels import hsic_statistics, pairwise_hsic
from repflow.triton_kernels._dispatch import force

EPS = np.finfo(np.float64).eps
ESTIMATORS = ("unbiased", "biased")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_agrees_with_the_definitions(flat_case, estimator, oracle):
    states, mask = flat_case.states, flat_case.mask
    h, groups = oracle.upcast(states), oracle.token_groups(states, mask)
    got = hsic_statistics(states, mask, estimator=estimator)
    want, terms = oracle.hsic(h, groups, estimator)
    assert got.hsic.dtype == torch.float64 and got.hsic.shape == want.shape
    assert got.count.tolist() == [len(oracle.examples(h, group)) for group in groups]
    np.testing.assert_array_equal(got.hsic.isnan().numpy(), np.isnan(want))
    # Both sides are float64. What cancels is the oracle's Gram matrices, which are not centred: it keeps 2⁻⁵² of them.
    error = np.abs(got.hsic.numpy() - want)
    assert (error <= 1e-12 * np.abs(want) + 64 * EPS * terms)[~np.isnan(want)].all()


def test_fourth_moments_agree(flat_case, oracle):
    states, mask = flat_case.states, flat_case.mask
    h, groups = oracle.upcast(states), oracle.token_groups(states, mask)
    got = hsic_statistics(states, mask)
    total, largest = oracle.fourth_moments(h, groups)
    # Of equal tokens only the rounding of the oracle's mean is left.
    noise = (64 * EPS * np.abs(h[np.isfinite(h)]).max(initial=0.0) * h.shape[3] ** 0.5) ** 4
    np.testing.assert_allclose(got.fourth_moment.numpy(), total, rtol=1e-10, atol=noise)
    np.testing.assert_allclose(got.fourth_moment_max.numpy(), largest, rtol=1e-10, atol=noise)


def test_hand_worked_values():
    """Tokens 0, 1, 2, 3 of one feature: Σx² = 5 about their mean, and ⟨K̃, K̃⟩ = 25 − Σx⁴ = 25 − 41/4."""
    states = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 4, 1)
    assert pairwise_hsic(states, estimator="biased").item() == pytest.approx(25 / 9)
    assert pairwise_hsic(states).item() == pytest.approx((25 - 41 / 4 + 25 / 6 - 41 / 4) / 4)


def dot(u: list[Fraction], v: list[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(u, v, strict=True)), Fraction())


def exact_unbiased(x: list[list[Fraction]], y: list[list[Fraction]]) -> Fraction:
    """The unbiased estimator in rational numbers, from uncentred Grams with a zero diagonal."""
    n = len(x)
    grams = [[[Fraction(u is not v) * dot(u, v) for v in tokens] for u in tokens] for tokens in (x, y)]
    rows_a, rows_b = ([sum(row, Fraction()) for row in gram] for gram in grams)
    trace = sum((dot(a, b) for a, b in zip(*grams, strict=True)), Fraction())
    product = sum(rows_a) * sum(rows_b) / Fraction((n - 1) * (n - 2))
    return (trace + product - Fraction(2, n - 2) * dot(rows_a, rows_b)) / (n * (n - 3))


@pytest.mark.parametrize("sink", [1e1, 1e3, 1e5])
def test_one_huge_token_cancels_as_it_should(sink: float):
    """The sink's terms, of order sink⁴, cancel. float64 keeps all but 2⁻⁵² of them: 2e4 of 1e20, at most."""
    states = torch.randn(2, 1, 7, 3)
    states[:, 0, 2, 0] = sink
    x, y = ([[Fraction(entry) for entry in token] for token in layer[0].tolist()] for layer in states)
    got = pairwise_hsic(states)[0]
    for value, want in ((got[0, 0], exact_unbiased(x, x)), (got[0, 1], exact_unbiased(x, y))):
        assert value.item() == pytest.approx(float(want), abs=8 * EPS * sink**4)


def test_a_token_bad_in_one_state_is_left_out_of_all():
    states = torch.randn(3, 1, 8, 4)
    without = torch.cat([states[:, :, :5], states[:, :, 6:]], dim=2)
    states[1, 0, 5, 2] = torch.nan
    got = hsic_statistics(states)
    assert got.count.tolist() == [7]
    torch.testing.assert_close(got.hsic, pairwise_hsic(without), rtol=1e-12, atol=0)


def test_a_dead_state_takes_no_token_from_the_others():
    states = torch.randn(3, 2, 8, 4)
    others = pairwise_hsic(states[[0, 2]])
    states[1, 0] = torch.inf
    got = hsic_statistics(states)
    assert got.count.tolist() == [8, 8]
    assert got.hsic[0].isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    torch.testing.assert_close(got.hsic[:, [0, 0, 2, 2], [0, 2, 0, 2]], others.flatten(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("estimator", "least"), [("unbiased", 4), ("biased", 2)])
def test_too_few_tokens_give_nan(estimator, least: int):
    mask = torch.arange(5) < torch.arange(6).unsqueeze(1)
    got = hsic_statistics(torch.randn(2, 6, 5, 3), mask, estimator=estimator)
    assert got.count.tolist() == [0, 1, 2, 3, 4, 5]
    assert got.enough(estimator).tolist() == [n >= least for n in range(6)]
    assert got.hsic.isnan().all(-1).all(-1).tolist() == [n < least for n in range(6)]
    assert got.hsic.isnan().any(-1).any(-1).tolist() == [n < least for n in range(6)]


@pytest.mark.parametrize("shape", [(2, 0, 4, 3), (2, 3, 0, 3)])
def test_an_empty_batch(shape: tuple[int, ...]):
    got = hsic_statistics(torch.ones(shape))
    assert got.hsic.shape == (shape[1], 2, 2)
    assert got.hsic.isnan().all()
    assert got.count.tolist() == [0] * shape[1]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in Triton's interpreter
def test_selected_tokens_are_those_tokens_alone(implementation, documents):
    states = torch.randn(3, 4, 11, 6)
    rows, tokens = torch.tensor([1, 3]), torch.tensor([0, 2, 3, 4, 6, 7, 8, 10])
    mask = torch.arange(8).expand(2, -1) // 4 + 1 if documents else torch.arange(8).expand(2, -1) < 7
    with force(implementation):
        got = hsic_statistics(states, mask, selected=rows.unsqueeze(1) * 11 + tokens)
        want = hsic_statistics(states[:, rows][:, :, tokens], mask)
    assert len(got.count) == (4 if documents else 2)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_a_mask_must_fit_what_is_selected():
    with pytest.raises(ValueError, match=r"expected a mask of shape \[1, 4\] as in `selected`, got \[2, 5\]"):
        hsic_statistics(torch.randn(2, 2, 5, 3), torch.ones(2, 5).bool(), selected=torch.arange(4).unsqueeze(0))
