"""The default signatures on real training runs: healthy ones, and the same with a fault planted in them."""

import argparse
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from repflow.monitor import AlertWarning, RepflowWarning, find_residual_stream, open_run
from repflow.monitor.alert import Severity
from repflow.monitor.demo.options import Demo
from repflow.monitor.demo.run import run_demo
from repflow.monitor.signatures import DEFAULT, Signature
from tests.monitor.signatures.training import BLOCKS

FAMILIES = ("transformer", "ssm", "hybrid")
AFTER = 25
"""Steps after a healthy run: five snapshots, a fault being there from the second on."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_run_raises_nothing_and_everything_was_judged(healthy, family):
    run = healthy(family)
    assert run.losses[-1] < 0.5 * run.losses[0]
    assert run.alerts == []
    assert run.snapshots[-1].signatures == {signature.name: False for signature in DEFAULT}
    state = run.state["signatures"]
    assert len(state["collapse_onset"]["past"]) == 8 and len(state["norm_explosion"]["past"]) == 20
    assert all(seen["streaks"] == [0] * (BLOCKS + 1) for seen in state.values())


def test_the_demo_raises_nothing(tmp_path, monkeypatch):
    """The models of `repflow demo --quick` for as many steps, on less text: norms grow, and similarity has its peak."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    whole = Demo.of_size("small", quick=True, text=Path(argparse.__file__), folder=tmp_path)
    demo = replace(whole, recipe=replace(whole.recipe, sequence=32, batch=4))
    console = Console(file=io.StringIO())
    with warnings.catch_warnings():
        warnings.simplefilter("error", AlertWarning)
        assert run_demo(demo, console).exit_code == 0
    assert [model.name for model in demo.models] == list(FAMILIES)
    for model in demo.models:
        run = open_run(demo.run_file(model))
        assert run.sizes["step"] == 11 and run.attrs["alerts"] == "[]"
        assert float(run["inter_token"].max()) > 0.7 and float(run["norms"].max()) > 20


def block(model: nn.Module, index: int) -> nn.Module:
    return find_residual_stream(model).blocks[index].module


def after_block(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """A fault in what a block returns."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def plant(model: nn.Module) -> None:
        # before the hooks of the monitor, as if the block itself did it
        block(model, index).register_forward_hook(hook, prepend=True)

    return plant


def pulled_to_the_mean(share: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (1 - share) * x + share * x.mean(1, keepdim=True)


def dwarfed(x: Tensor) -> Tensor:
    """The first token of every sequence gets a massive feature."""
    spike = torch.zeros_like(x)
    spike[:, 0, 5] = 300 * x.detach().abs().median()
    return x + spike


def frozen_projections(block: nn.Module) -> list[nn.Parameter]:
    """What a block of GPT-NeoX adds to the stream by: output weights of attention and MLP, then their biases."""
    last = [block.get_submodule("attention.dense"), block.get_submodule("mlp.dense_4h_to_h")]
    parameters = [getattr(layer, name) for name in ("weight", "bias") for layer in last]
    for parameter in parameters:
        parameter.requires_grad_(False)
    return parameters


@torch.no_grad()
def dead(model: nn.Module) -> None:
    for parameter in frozen_projections(block(model, 3)):
        parameter.zero_()


@torch.no_grad()
def copies(model: nn.Module) -> None:
    """All blocks but the first add one and the same small vector to every token."""
    for index in range(1, 6):
        *weights, first, second = frozen_projections(block(model, index))
        for parameter in (*weights, first):
            parameter.zero_()
        second.copy_(0.05 * torch.randn(second.shape, generator=torch.Generator().manual_seed(index)))


@torch.no_grad()
def exploding(model: nn.Module) -> None:
    for parameter in frozen_projections(block(model, 5)):  # behind it, other blocks would be dead beside such norms
        parameter.mul_(300)


@torch.no_grad()
def not_a_number(model: nn.Module) -> None:
    frozen_projections(block(model, 2))[0][0, 0] = torch.nan


# family, fault, signature -> the states that its alert names
FAULTS: dict[str, tuple[str, Callable[[nn.Module], None], dict[str, tuple[int, ...]]]] = {
    "NaN weight": ("transformer", not_a_number, {"nonfinite": (3, 4, 5, 6)}),
    "weights that explode": ("transformer", exploding, {"norm_explosion": (6,)}),
    "dead block": ("transformer", dead, {"dead_blocks": (4,)}),
    "copies": ("transformer", copies, {"redundant_layers": (1, 2, 3, 4, 5, 6)}),
    "massive activation": (
        "transformer",
        after_block(2, dwarfed),
        {"massive_activations": (3, 4, 5, 6), "dominant_token": (3, 4, 5, 6)},
    ),
    "early oversmoothing": (
        "transformer",
        after_block(1, pulled_to_the_mean(0.9)),
        {"early_oversmoothing": (2,), "collapse_onset": (2, 3, 4, 5, 6)},
    ),
    "late oversmoothing": ("transformer", after_block(4, pulled_to_the_mean(0.9)), {"collapse_onset": (5, 6)}),
    "state-space block that averages": (
        "ssm",
        after_block(5, pulled_to_the_mean(0.9)),
        {"late_homogenisation": (6,), "collapse_onset": (6,)},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_once_with_its_layer(healthy, name):
    family, plant, expected = FAULTS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = healthy(family).copy().run(AFTER, plant=plant)
    assert {alert.signature: alert.states for alert in run.alerts} == expected
    assert len(run.alerts) == len(expected)  # once each, with the fault in every snapshot from then on
    assert run.snapshots[0].alerts == ()
    for alert in run.alerts:
        assert f"state {alert.states[0]}, the output of block {alert.states[0] - 1}" in alert.message
        assert alert.value > alert.threshold
        assert run.snapshots[-1].signatures[alert.signature]
    told = [str(warning.message) for warning in caught if warning.category is AlertWarning]
    assert told == [f"repflow: {alert}" for alert in run.alerts]


def test_in_a_hybrid_each_block_is_judged_by_its_kind(healthy):
    def plant(model: nn.Module) -> None:
        for index in (0, 1):
            after_block(index, pulled_to_the_mean(0.9))(model)

    run = healthy("hybrid").copy().run(AFTER, plant=plant)
    assert run.snapshots[-1].inter_token[1] > 0.85
    states = {alert.signature: alert.states for alert in run.alerts}
    assert states["early_oversmoothing"] == (2,)  # block 0 is a state-space block: its output is not looked at
    assert "late_homogenisation" not in states  # the last blocks are attention
    assert 1 in states["collapse_onset"]  # which goes by no kind


def test_a_resumed_run_does_not_repeat_its_alerts_and_says_when_the_fault_comes_again(healthy):
    first = healthy("transformer").copy().run(AFTER, plant=dead)
    assert [alert.signature for alert in first.alerts] == ["dead_blocks"]
    again = first.copy().run(15)
    assert again.alerts == [] and again.snapshots[-1].signatures["dead_blocks"]

    forgetful = first.copy()
    forgetful.state = {}
    assert "dead_blocks" in [alert.signature for alert in forgetful.run(15).alerts]

    healed = again.copy()
    with torch.no_grad():
        for parameter in frozen_projections(block(healed.model, 3)):
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    healed.run(5)
    assert healed.alerts == [] and not healed.snapshots[-1].signatures["dead_blocks"]
    assert "dead_blocks" in [alert.signature for alert in healed.copy().run(AFTER, plant=dead).alerts]


def test_nan_that_an_update_has_spread_is_said_to_hide_its_layer(healthy):
    run = healthy("transformer").copy()

    def spread(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.run(10, plant=spread)
    # The alert alone: not that sequences are too short, of which no token is finite.
    assert [warning.category for warning in caught] == [AlertWarning]
    (alert,) = run.alerts
    assert alert.states == (0, 1, 2, 3, 4, 5, 6)
    assert "state 0, what enters the first block" in alert.message and "an update spread them" in alert.message


@dataclass(frozen=True, kw_only=True)
class Broken(Signature):
    name: str = "broken"
    severity: Severity = "info"
    patience: int = 1
    warmup_steps: int = 0
    threshold: float = 0.0
    release: float = 0.0

    title: ClassVar[str] = "Never"
    reading: ClassVar[str] = "nothing"
    suggestion: ClassVar[str] = "None"

    def read(self, snapshot, blocks, past):
        raise LookupError("no such value")


def test_training_is_bit_for_bit_that_without_signatures_also_if_one_fails(healthy):
    plain = healthy("transformer").copy().run(10, signatures=())
    assert plain.snapshots[-1].signatures == {}
    with pytest.warns(RepflowWarning) as caught:
        judged = healthy("transformer").copy().run(10, signatures=(Broken(), *DEFAULT))
    (warning,) = caught
    assert "'broken' failed at step 240 and is left out for the rest of the run" in str(warning.message)
    assert "LookupError: no such value" in str(warning.message)
    assert judged.snapshots[-1].signatures["broken"] is False
    assert plain.losses == judged.losses
    for mine, other in zip(plain.model.parameters(), judged.model.parameters(), strict=True):
        assert torch.equal(mine, other)
