"""Offline measurements on a GPU that is not the current one, and on two of them; left out where there is only one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from repflow.monitor.offline.loading import LoadedModel, load_model
from repflow.monitor.offline.recorder import StateRecorder
from tests.monitor.offline import tiny

SPREAD = {"embed_in": 0, "rotary_emb": 0, "layers.0": 0, "layers.1": 1, "layers.2": 1, "final_layer_norm": 1}
"""Of a gpt_neox: where its parts lie."""


def tokens(loaded: LoadedModel) -> torch.Tensor:
    return torch.arange(12, device=loaded.device).view(2, 6) % tiny.VOCABULARY


def test_models_run_on_the_device_of_their_tokens(tmp_path: Path) -> None:
    """Kernels that do not ask where their tensors are, such as those of mamba_ssm, run on the current device."""
    loaded = load_model(str(tiny.save(tmp_path, tiny.KINDS[0])), device="cuda:1")
    seen: list[int] = []
    loaded.model.register_forward_pre_hook(lambda *_: seen.append(torch.cuda.current_device()))
    with StateRecorder(loaded.model) as recorder:
        recorder.measure(tokens(loaded))
    assert seen == [1] and torch.cuda.current_device() == 0


def test_blocks_run_on_the_device_that_they_lie_on(tmp_path: Path) -> None:
    """And the sums are those of one GPU, up to rounding."""
    folder = str(tiny.save(tmp_path, "gpt_neox"))
    whole, spread = load_model(folder, device="cuda:0"), load_model(folder, device_map=SPREAD)
    model: Any = spread.model
    seen: list[tuple[int, int]] = []

    def see(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((torch.cuda.current_device(), args[0].get_device()))

    for block in model.layers:
        block.mlp.register_forward_pre_hook(see)
    with StateRecorder(whole.model) as one, StateRecorder(model) as two:
        expected, found = one.measure(tokens(whole)).sums, two.measure(tokens(spread)).sums
    assert seen == [(0, 0), (1, 1), (1, 1)] and torch.cuda.current_device() == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_forward_that_raises_puts_the_current_device_back(tmp_path: Path) -> None:
    loaded = load_model(str(tiny.save(tmp_path, "gpt_neox")), device_map=SPREAD)
    model: Any = loaded.model

    def fail(*_: object) -> None:
        assert torch.cuda.current_device() == 1
        raise RuntimeError("on the second GPU")

    model.layers[1].attention.register_forward_hook(fail)
    with StateRecorder(model) as recorder, pytest.raises(RuntimeError, match="on the second GPU"):
        recorder.measure(tokens(loaded))
    assert torch.cuda.current_device() == 0
