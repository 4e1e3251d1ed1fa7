"""Decay rates on a GPU: the counts of the CPU, without waiting."""

import pytest
import torch

from repflow.monitor.functional.ssm import count_rates
from tests.gpu.test_engine import DEVICE, syncs_are_errors


@pytest.mark.parametrize("masked", [False, True])
def test_the_counts_of_the_cpu(masked: bool) -> None:
    rates = torch.exp(2 * torch.randn(5000, 33) - 3)
    rates[7, 3], rates[9, 1], rates[11, 0] = torch.nan, torch.inf, 0.0
    valid = torch.rand(5000) < 0.7 if masked else None
    given = rates.to(DEVICE), valid.to(DEVICE) if valid is not None else None
    with syncs_are_errors():
        got = count_rates(*given)
    for ours, theirs in zip(got, count_rates(rates, valid), strict=True):
        assert torch.equal(ours.long().cpu(), theirs)


def test_more_than_float32_could_count() -> None:
    equal = torch.full((2**13, 2**12 + 1), 0.1, device=DEVICE)
    assert int(count_rates(equal)[1].max()) == equal.numel()
