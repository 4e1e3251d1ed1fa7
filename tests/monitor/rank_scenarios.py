"""What each of two ranks does in a test of `test_ranks.py`; `two_ranks.py` runs all of it.

Each scenario has a process group of its own, so that what one leaves behind cannot meet the next.
"""

import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_module, distribute_tensor

from repflow.monitor import ranks
from tests.monitor import rank_regularizer, toy
from tests.monitor.compiling import graphs_and_breaks
from tests.monitor.rank_training import (
    PLACEMENTS,
    WAYS,
    batch,
    device,
    model,
    no_waiting,
    result,
    states_and_mask,
    train,
    watch,
    wrapped,
)
from tests.monitor.sequence_scenarios import SLICED


def way_of_training(kind: str, rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """With and without the monitor; counts the collectives that the monitor calls, and their sizes."""
    bare = train(None, wrapped(model(), kind), rank)
    net = wrapped(model(), kind)
    monitor, sink = watch(net)
    sizes, group, add_up = [], monitor._publication._group, dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is group:
            sizes.append(tensor.numel())
        return add_up(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", counting):
        losses = train(monitor, net, rank)
        monitor.close()
    return result(monitor, sink, caught, bare=bare, losses=losses, sizes=sizes)


def hook_fails(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    net = model()
    monitor, sink = watch(net)

    def broken(*args: Any) -> None:
        raise RuntimeError("planted")

    def plant(step: int) -> None:
        if rank == 1 and step == 1:
            monitor._capture._store = broken  # pyright: ignore

    losses = train(monitor, net, rank, plant)
    monitor.close()
    return result(monitor, sink, caught, losses=losses, bare=train(None, model(), rank))


def packing_fails(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Rank 0 fails at the end of step 1, when its results should leave."""
    net = model()
    monitor, sink = watch(net)

    def plant(step: int) -> None:
        if rank == 0 and step == 1 and monitor._step is not None:
            monitor._step.sums.flat = None  # pyright: ignore

    train(monitor, net, rank, plant)
    monitor.close()
    return result(monitor, sink, caught)


def nothing_to_record(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """On rank 1: an empty batch, then no forward at all; on both: no forward."""
    net = model()
    monitor, sink = watch(net)
    for step in range(4):
        with monitor.step(step):
            if rank == 1 and step == 1:
                net(torch.zeros(0, 12, dtype=torch.long, device=device())).sum().backward()
            elif step != 3 and not (rank == 1 and step == 2):
                ids, mask = batch(step, rank)
                toy.loss_of(net, ids, mask).backward()
    monitor.close()
    return result(monitor, sink, caught)


def step_raises(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Rank 1 raises in step 1, as when out of memory, and goes on."""
    net = model()
    monitor, sink = watch(net)
    for step in range(3):
        with suppress(ZeroDivisionError), monitor.step(step):
            ids, mask = batch(step, rank)
            toy.loss_of(net, ids, mask).backward()
            if rank == 1 and step == 1:
                raise ZeroDivisionError
    monitor.close()
    return result(monitor, sink, caught)


def ends_with_an_exception(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Rank 1 raises in step 1 and closes; rank 0, which publishes step 1, waits no longer than its group's timeout."""
    net = model()
    monitor, sink = watch(net, process_group=dist.new_group(timeout=timedelta(seconds=4)))
    seconds = 0.0
    for step in range(2):
        with suppress(ZeroDivisionError), monitor.step(step):
            ids, mask = batch(step, rank)
            toy.loss_of(net, ids, mask).backward()
            if rank == 1 and step == 1:
                raise ZeroDivisionError
        if step == 0:
            monitor.flush()
    began = time.perf_counter()
    monitor.close()
    seconds = time.perf_counter() - began
    return result(monitor, sink, caught, seconds=seconds)


def different_steps(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    net = model()
    monitor, sink = watch(net)
    for step in (0, 1 + rank, 3):
        with monitor.step(step):
            toy.loss_of(net, *batch(step, rank)).backward()
    monitor.close()
    return result(monitor, sink, caught)


def one_rank_without_a_monitor(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Its next collective is one of the training loop, and must not meet one of the monitor."""
    net, group = model(), dist.new_group()
    if rank == 1:
        total = torch.ones(3, device=device())
        dist.all_reduce(total, group=group)
        return {"total": total.cpu()}
    monitor, sink = watch(net, process_group=group)
    with patch.object(ranks, "_JOIN_TIMEOUT", timedelta(seconds=1)):
        train(monitor, net, rank)
    total = torch.ones(3, device=device())
    dist.all_reduce(total, group=group)
    monitor.close()
    return result(monitor, sink, caught, total=total.cpu())


def not_reduced(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    net = model()
    monitor, sink = watch(net, reduce=False)
    train(monitor, net, rank)
    monitor.close()
    return result(monitor, sink, caught)


def late(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Rank 1 publishes step 1 two seconds late. Rank 0 times its own publishing, and work behind it."""
    net = model()
    monitor, sink = watch(net)
    seconds = 0.0
    for step in range(2):
        with monitor.step(step):
            toy.loss_of(net, *batch(step, rank)).backward()
        monitor.log(loss=torch.ones((), device=device()), number=step)
        if rank == 1 and step == 1:
            time.sleep(2)
        began = time.perf_counter()
        with no_waiting(step == 1):
            monitor.publish()
        toy.loss_of(net, *batch(step, rank)).item()
        seconds = time.perf_counter() - began
    monitor.close()
    return result(monitor, sink, caught, seconds=seconds)


def scalars(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Names are matched whatever their order; one is logged on rank 1 only, and there are too many."""
    net = model()
    monitor, sink = watch(net)
    with monitor.step(0):
        toy.loss_of(net, *batch(0, rank)).backward()
    for name in ("a", "b") if rank == 0 else ("b", "own", "a"):
        monitor.log(**{name: torch.tensor(float(rank)) if name == "a" else 10.0 * rank})
    monitor.log(**{f"many_{number}": number for number in range(20)})
    monitor.close()
    return result(monitor, sink, caught)


def probe(failing: int | None, rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """The same probe batch on both ranks, of which one may fail: the other must not wait for it in DDP's forward."""

    def net() -> nn.Module:
        made = model()
        made.register_buffer("sent", torch.zeros(1, device=device()))  # which DDP sends whenever it runs itself
        return wrapped(made, "ddp")

    def given() -> tuple[Tensor, Tensor]:
        if rank == failing:
            raise ZeroDivisionError("planted")
        return batch(9, 0)

    bare, trained = train(None, net(), rank), net()
    monitor, sink = watch(trained, probe_batch=given)
    losses = train(monitor, trained, rank)
    monitor.close()
    return result(monitor, sink, caught, bare=bare, losses=losses)


class Gate(nn.Module):
    """A block of operations on single elements: PyTorch 2.11 has no linear layer for states sharded by tokens."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, device=device()))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x * self.weight)


class Stream(nn.Module):
    """Blocks and no embedding, so that states have whatever form the input has."""

    def __init__(self, features: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Gate(features) for _ in range(3)])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        del attention_mask  # for the monitor
        for block in self.blocks:
            x = block(x)
        return x.full_tensor() if isinstance(x, DTensor) else x


def distributed_tensors(
    placement: Placement, compiled: bool, rank: int, caught: list[warnings.WarningMessage]
) -> dict[str, Any]:
    """Two steps whose states are DTensors, without the monitor and with it: their gradients, graphs and breaks."""
    mesh = init_device_mesh(device().type, (2,))
    x, mask = (value.to(device()) for value in states_and_mask())
    of_mask = Replicate() if placement.is_shard(2) else placement
    inputs = distribute_tensor(x, mesh, [placement]), distribute_tensor(mask, mesh, [of_mask])

    def step(run: nn.Module) -> Tensor:
        run(*inputs).square().mean().backward()
        return next(run.parameters()).grad.full_tensor()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    def prepared() -> nn.Module:
        torch.compiler.reset()
        graphs_and_breaks()
        net = distribute_module(Stream(x.shape[-1]), mesh)
        return torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net  # pyright: ignore

    net = prepared()
    bare = [step(net), step(net)], graphs_and_breaks()
    net = prepared()
    monitor, sink = watch(net, reduce=placement.is_shard(0))
    grads = []
    for number in range(2):
        with monitor.step(number):
            grads.append(step(net))
    monitor.close()
    return result(monitor, sink, caught, bare=bare, got=(grads, graphs_and_breaks()))


SCENARIOS: dict[str, Callable[[int, list[warnings.WarningMessage]], dict[str, Any]]] = {
    **{kind: partial(way_of_training, kind) for kind in WAYS},
    **{
        f"{name}, {'compiled' if compiled else 'eager'}": partial(distributed_tensors, placement, compiled)
        for name, placement in PLACEMENTS.items()
        for compiled in (False, True)
    },
    **{
        call.__name__: call
        for call in (
            hook_fails, packing_fails, nothing_to_record, step_raises, ends_with_an_exception, different_steps,
            one_rank_without_a_monitor, not_reduced, late, scalars,
        )
    },
    **{
        f"regularized, {kind}": partial(rank_regularizer.regularized, kind, rank_regularizer.STRENGTH)
        for kind in rank_regularizer.WAYS
    },
    "regularized, controller": partial(rank_regularizer.regularized, "ddp", rank_regularizer.CONTROLLER),
    "regularized, tensor parallel": rank_regularizer.tensor_parallel,
    "probe": partial(probe, None),
    "probe fails": partial(probe, 1),
    **SLICED,
}  # fmt: skip
