"""Decay rates on a GPU: the counts of the CPU, without waiting."""

from importlib.util import find_spec

import pytest
import torch

from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.functional.ssm import count_rates
from tests.gpu.test_engine import DEVICE, right_padding, syncs_are_errors
from tests.monitor.ssm_models import MODELS, build


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


@pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="transformers takes its kernels on a CPU too")
@pytest.mark.parametrize("family", ["Mamba2", "FalconH1"])
def test_a_sampled_step_reads_what_it_reads_on_the_cpu(family: str) -> None:
    """Float32 rates of the two devices differ by rounding: a few may fall into the next bin."""
    snapshots = []
    for device in (torch.device("cpu"), DEVICE):
        model, ids = build(family).to(device), torch.arange(1, 37, device=device).view(3, 12)
        monitor = Monitor(model, MonitorConfig(every_n_steps=1))
        with monitor.step(0):
            model(input_ids=ids, attention_mask=right_padding(ids).long(), labels=ids).loss.backward()
        monitor.flush()
        assert monitor.enabled and monitor.latest is not None and monitor.latest.ssm_blocks == MODELS[family][1]
        snapshots.append(monitor.latest)
    cpu, gpu = snapshots
    for name in ("ssm_decay", "ssm_memory"):
        rows = [getattr(snapshot, name)[list(MODELS[family][1])] for snapshot in (gpu, cpu)]
        torch.testing.assert_close(*rows, rtol=0.12, atol=1e-6)
    assert gpu.overhead_ms > 0
