"""(hidden, residual): the state of mamba_ssm's blocks, on models with its calling convention and on its own code.

mamba_ssm's own Python code is run where it can be imported, with or without its compiled part; `tests/gpu` tests it as
it was built.
"""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from repflow.monitor import Monitor, MonitorConfig
from tests.handwritten import MambaLike
from tests.matrix import captured

PARTS = ["ssm", "attention+mlp", "ssm"]
IDS = torch.arange(24).view(2, 12)


def own_states(model: MambaLike) -> list[Tensor]:
    """What each unfused block's first norm takes, and then the last norm: the sums that the model itself makes."""
    seen: list[Tensor] = []
    norms = [model.get_submodule(f"backbone.layers.{index}.norm") for index in range(len(PARTS))]
    for norm in (*norms, model.get_submodule("backbone.norm_f")):
        norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    model(IDS)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_the_sums_that_the_model_makes(dtype: torch.dtype) -> None:
    """The residual is float32: in bfloat16 the first state alone is narrower, and nothing is rounded."""
    model = MambaLike(PARTS, 64).to(dtype)
    own = own_states(copy.deepcopy(model))
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    seen = captured(monitor)
    with monitor.step(0):
        model(IDS).float().sum().backward()
    assert seen[0].dtype == torch.float32
    assert all(torch.equal(ours.to(dtype), theirs) for ours, theirs in zip(seen[0], own, strict=True))


def test_states_in_the_convention_of_transformers() -> None:
    """The last is what the norm behind the blocks returns."""
    model = MambaLike(PARTS, 64)
    normed: list[Tensor] = []
    model.get_submodule("backbone.norm_f").register_forward_hook(lambda module, args, out: normed.append(out.detach()))
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, states="hf"))
    seen = captured(monitor)
    with monitor.step(0):
        model(IDS).sum().backward()
    assert torch.equal(seen[0][-1], normed[0])


def test_a_final_norm_that_is_fused_is_never_called_and_that_is_said() -> None:
    model = MambaLike(PARTS, 64, fused=True)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, states="hf"))
    with monitor.step(0):
        model(IDS).sum().backward()
    with pytest.warns(
        RuntimeWarning, match=r'did not call the final norm, as where it is fused.*use states="residual"'
    ):
        monitor.flush()


if importlib.util.find_spec("mamba_ssm") and importlib.util.find_spec("einops"):

    def test_the_package_itself() -> None:
        """In a process of its own: transformers would call the scans of any mamba_ssm that it can import."""
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-W", "ignore", "-m", "tests.mamba_models"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("as expected") == 40
