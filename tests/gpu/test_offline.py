"""Offline measurements on a GPU that is not the current one."""

from pathlib import Path

import pytest
import torch

from repflow.monitor.offline.loading import load_model
from repflow.monitor.offline.recorder import StateRecorder
from tests.monitor.offline import tiny


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_models_run_on_the_device_of_their_tokens(tmp_path: Path) -> None:
    """Kernels that do not ask where their tensors are, such as those of mamba_ssm, run on the current device."""
    loaded = load_model(str(tiny.save(tmp_path, tiny.KINDS[0])), device="cuda:1")
    seen: list[int] = []
    loaded.model.register_forward_pre_hook(lambda *_: seen.append(torch.cuda.current_device()))
    with StateRecorder(loaded.model) as recorder:
        recorder.measure(torch.arange(12, device=loaded.device).view(2, 6) % tiny.VOCABULARY)
    assert seen == [1] and torch.cuda.current_device() == 0
