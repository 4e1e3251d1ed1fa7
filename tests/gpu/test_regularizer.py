"""The regularizer on a GPU: the gradient is that of the reference, compiled or not, and a step waits for nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from repflow.monitor.regularizer import Regularizer
from repflow.monitor.strength import DualAscent, Strength
from repflow.triton_kernels._dispatch import force
from tests.monitor import regularizing, toy

DEVICE = torch.device("cuda")
IDS = toy.batch(3, 40).to(DEVICE)
MASKS = torch.ones_like(IDS)
MASKS[:, 25:] = 2
MASKS[0, 35:] = 0


def attached(net: Any, strength: Strength = 0.7) -> Regularizer:
    return Regularizer(net, target=-0.2, layers=(1, 3), strength=strength)


def backward(net: Any, regularizer: Regularizer, mask: Tensor | None = MASKS) -> None:
    loss = toy.loss_of(net, IDS, mask)
    regularizer.follow(loss)
    (loss / 2).backward()
    regularizer.step()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_is_that_of_the_reference(compiled: bool) -> None:
    torch.compiler.reset()
    net = regularizing.model(torch.float32, width=64).to(DEVICE)
    plain = copy.deepcopy(net)
    called = torch.compile(net) if compiled else net
    with force("reference"):
        backward(plain, attached(plain))
    backward(called, attached(called))
    regularizing.assert_same(regularizing.gradients(net), regularizing.gradients(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mask", [None, MASKS], ids=["none", "integers"])
def test_a_step_waits_for_nothing(mask: Tensor | None) -> None:
    net = regularizing.model(torch.float32, width=64).to(DEVICE).bfloat16()
    regularizer = attached(net, DualAscent(step_size=1.0))
    for _ in range(2):
        backward(net, regularizer, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            backward(net, regularizer, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert regularizer.state_dict()["step"] == 5 and min(regularizer.state_dict()["strength"]) > 0


def test_a_negative_scale_is_told_one_step_later() -> None:
    net = regularizing.model(torch.float32, width=64).to(DEVICE)
    regularizer = attached(net)
    loss = toy.loss_of(net, IDS, MASKS)
    regularizer.follow(loss)
    (-loss).backward()
    regularizer.step()
    with pytest.raises(RuntimeError, match="in step 0 a negative gradient came back"):
        backward(net, regularizer)
