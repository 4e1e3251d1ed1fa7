"""Quantiles from counts against numpy on the raw values, within the bound that is promised."""

import numpy as np
import pytest
import torch

from repflow.monitor.functional.ssm import (
    LONGEST,
    QUANTILES,
    RATE_BINS,
    SHORTEST,
    count_rates,
    decay_quantiles,
    memory_quantiles,
    rate_edges,
)


def test_every_rate_falls_into_the_bin_between_its_edges() -> None:
    edges = rate_edges()
    assert edges[0] == 1 / LONGEST and edges[-1] == 1 / SHORTEST and (edges[1:] / edges[:-1] <= 9 / 8).all()
    at, inside = edges[:-1].float(), (edges[:-1] * 1.05).float()
    below = torch.nextafter(edges[1:].float(), torch.tensor(0.0))
    for rates in (at, inside, below):
        tokens, each, nonfinite = count_rates(rates.unsqueeze(1))
        assert tokens.tolist() == each.tolist() == [1] * RATE_BINS and nonfinite == 0
    outside = torch.tensor([[0.0], [1e-9], [1e9], [3e38]])
    assert count_rates(outside)[0].nonzero().flatten().tolist() == [0, RATE_BINS - 1]
    assert count_rates(outside)[0].sum() == 4


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize("tokens", [1, 2, 7, 200])
def test_quantiles_are_those_of_numpy_within_a_bin(tokens: int, spread: float) -> None:
    rates = torch.exp(spread * torch.randn(tokens, 5) - 3)
    counted, each, _ = count_rates(rates)
    lengths = (1 / rates.double().numpy()).clip(SHORTEST, LONGEST)
    for counts, values in ((counted, lengths.max(1)), (each, lengths)):
        truth = np.quantile(values, QUANTILES, method="inverted_cdf")
        measured = memory_quantiles(counts.double()).numpy()
        assert (measured / truth <= 9 / 8 * (1 + 1e-12)).all() and (truth / measured <= 9 / 8 * (1 + 1e-12)).all()
        assert (np.diff(measured) >= 0).all()
        decay = decay_quantiles(counts.double()).numpy()
        assert np.abs(np.log(-np.log(decay) * truth)).max() <= np.log(9 / 8) + 1e-9
        assert np.abs(decay - np.exp(-1 / truth)).max() < 0.05 and (np.diff(decay) >= 0).all()


def test_what_does_not_count() -> None:
    rates = torch.full((6, 3), 0.1)
    rates[1, 2], rates[2, 0], rates[4, 1] = torch.nan, torch.inf, torch.nan
    valid = torch.tensor([True, True, True, False, False, True])
    tokens, each, nonfinite = count_rates(rates, valid)
    assert (tokens.sum(), each.sum(), nonfinite) == (2, 6, 2)
    assert count_rates(rates)[0].sum() == 3 and count_rates(rates)[2] == 3
    assert memory_quantiles(torch.zeros(2, 3, RATE_BINS)).isnan().all()


def test_counts_of_parts_add_up() -> None:
    rates = torch.exp(torch.randn(50, 4))
    parts = [count_rates(part) for part in rates.split(7)]
    for whole, *pieces in zip(count_rates(rates), *parts, strict=True):
        assert torch.equal(whole, torch.stack(pieces).sum(0))


def test_several_blocks_at_once() -> None:
    rates = torch.exp(3 * torch.randn(4, 50, 3) - 3)
    rates[1, 7, 2] = torch.inf
    valid = torch.rand(50) < 0.7
    for together, *alone in zip(count_rates(rates, valid), *(count_rates(row, valid) for row in rates), strict=True):
        assert torch.equal(together, torch.stack(alone))
