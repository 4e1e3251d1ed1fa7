"""The regularizer on real architectures: all weights get the gradient of the loss with the term written into it."""

import copy
from typing import Any

import pytest
from torch import Tensor, nn

from repflow.monitor import find_residual_stream
from repflow.monitor.regularizer import Regularizer
from tests.architectures import ARCHITECTURES, Architecture
from tests.matrix import batch, forward, loss_of, make
from tests.monitor.regularizing import term

TARGET, STRENGTH, STEPS = -0.3, 0.7, 2
LAYERS = (1, 2)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}


def written_out(architecture: Architecture, net: nn.Module) -> dict[str, Tensor]:
    """Of the mean over micro-batches of the loss with the term, through the cosines of all pairs."""
    blocks = find_residual_stream(net, stream=architecture.stream).blocks
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(architecture.returned(output))

    for layer in LAYERS:
        blocks[layer - 1].module.register_forward_hook(keep)
    for step in range(STEPS):
        states.clear()
        loss = loss_of(forward(architecture, net, step))
        ((loss + STRENGTH * term(states, architecture.mask(*batch(step)), TARGET)) / STEPS).backward()
    return gradients(net)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_all_weights_get_the_gradient_of_the_loss_with_the_term(architecture: Architecture) -> None:
    net: Any = make(architecture, checkpointing=False).double()
    if hasattr(net, "set_experts_implementation"):
        net.set_experts_implementation("eager")  # the grouped products of PyTorch take no float64
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(net)
    regularizer = Regularizer(net, target=TARGET, layers=LAYERS, strength=STRENGTH, stream=architecture.stream)
    for step in range(STEPS):
        regularizer.follow(loss := loss_of(forward(architecture, net, step)))
        (loss / STEPS).backward()
    regularizer.step()
    got, want = gradients(net), written_out(architecture, plain)
    assert got.keys() == want.keys()
    off = sum(float((got[name] - want[name]).square().sum()) for name in want) ** 0.5
    assert off < 1e-6 * sum(float(grad.square().sum()) for grad in want.values()) ** 0.5
