"""Sampled steps of state-space models, on a GPU as on the CPU; left out where transformers would call mamba_ssm."""

import pytest
import torch

from repflow.monitor import Monitor, MonitorConfig
from tests.gpu.test_engine import DEVICE, right_padding
from tests.monitor.ssm_models import MODELS, build


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
