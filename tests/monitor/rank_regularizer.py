"""What each of two ranks trains with a regularizer, and the same in one process with the term written into the loss."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from repflow.monitor.regularizer import Regularizer
from repflow.monitor.strength import DualAscent, Strength
from tests.monitor import toy
from tests.monitor.rank_training import STEPS, batch, device, model, wrapped
from tests.monitor.regularizing import states_of, term

WAYS = ("ddp", "fsdp1", "fsdp2", "fsdp1 checkpointed", "fsdp2 checkpointed")
LAYERS = (2, 4)
TARGET, STRENGTH = -0.2, 0.5
CONTROLLER = DualAscent(step_size=0.4, maximum=0.15, band=0.1)


def regularized(kind: str, strength: Strength, rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Losses of some steps, and λ and similarity in each."""
    net = wrapped(model(), kind)
    regularizer = Regularizer(net, target=TARGET, layers=LAYERS, strength=strength)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses, seen = [], []
    for step in range(STEPS):
        loss = toy.loss_of(net, *batch(step, rank))
        regularizer.follow(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        regularizer.step()
        losses.append(loss.item())
        seen.append({key: float(value) for key, value in regularizer.metrics.items()})
    return {"losses": losses, "seen": seen, "state": regularizer.state_dict()}


def tensor_parallel(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """What is said of a model whose layers are spread over the ranks."""
    mesh = init_device_mesh(device().type, (2,), mesh_dim_names=("tp",))
    net = parallelize_module(model(), mesh, {"blocks.0.linear": ColwiseParallel()})
    try:
        Regularizer(net, target=TARGET, layers=LAYERS, strength=STRENGTH)
    except ValueError as error:
        return {"said": str(error)}
    finally:
        dist.barrier()
    return {"said": None}


def written_out() -> list[list[float]]:
    """Losses of each rank in one process, which trains on the mean over the ranks."""
    net = model(torch.device("cpu"))
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.1), []
    for step in range(STEPS):
        own: list[Tensor] = []
        for rank in range(2):
            ids, mask = batch(step, rank, torch.device("cpu"))
            with states_of(net.blocks, LAYERS) as states:
                own.append(toy.loss_of(net, ids, mask))
            ((own[-1] + STRENGTH * term(states, mask, TARGET)) / 2).backward()
        losses.append([loss.item() for loss in own])
        optimizer.step()
        optimizer.zero_grad()
    return [list(rank) for rank in zip(*losses, strict=True)]
