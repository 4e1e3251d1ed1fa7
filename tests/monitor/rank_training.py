"""What each of several ranks trains and watches, and what it tells of it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from repflow.monitor import Monitor, MonitorConfig, RunInfo, Snapshot
from repflow.monitor.sinks import AbstractSink
from tests.monitor import toy

STEPS = 3
WAYS = ("plain", "ddp", "fsdp1", "fsdp2", "fsdp1 checkpointed", "fsdp2 checkpointed")
"""How a model is trained on several ranks."""
PLACEMENTS = {"replicated": Replicate(), "rows": Shard(0), "tokens": Shard(1), "features": Shard(2)}
"""What each rank has of a state that is a DTensor."""


class Keep(AbstractSink):
    """Keeps the snapshots."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def start(self, run: RunInfo) -> None:
        pass

    def write(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def close(self) -> None:
        pass


def device() -> torch.device:
    """That of this rank; the CPU where there are no ranks."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", dist.get_rank()) if nccl else torch.device("cpu")


def model(where: torch.device | None = None) -> toy.Toy:
    """The same on every rank, without dropout."""
    torch.manual_seed(5)
    made = toy.Toy(blocks=4)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made.to(where or device())


def batch(step: int, rank: int, where: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """What a rank sees: ids and a mask.

    Ranks have unlike rows, lengths and padding, and rank 1 has packed documents, except on a GPU.
    """
    ids = toy.batch(3 + rank, 12 + 4 * rank, seed=10 * step + rank)
    mask = torch.ones_like(ids)
    if rank == 0:
        mask[0, 5:] = 0
        mask[1, :10] = 0
    else:
        mask[:, 7:] = 2
        mask[2, 1:] = 0
    where = where or device()
    return ids.to(where), mask.to(where) if where.type == "cpu" else mask.to(where) != 0


def states_and_mask() -> tuple[Tensor, Tensor]:
    """h^(0) for blocks without an embedding, and its padding: the same on every rank."""
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[1, 7:] = False
    return torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0)), mask


def one_process(
    which: tuple[int, ...] = (0, 1), steps: int = STEPS, where: torch.device | None = None
) -> list[Snapshot]:
    """The batches of these ranks as micro-batches of one process, which trains as DDP does."""
    net, sink = model(where), Keep()
    monitor = Monitor(net, MonitorConfig(every_n_steps=1), sinks=[sink])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(steps):
        for rank in which:
            with monitor.step(step):
                loss = toy.loss_of(net, *batch(step, rank, where))
                (loss / len(which)).backward()
            monitor.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    return sink.snapshots


def train(
    monitor: Monitor | None, net: nn.Module, rank: int, before: Callable[[int], None] | None = None, steps: int = STEPS
) -> list[float]:
    """Losses of some optimizer steps."""
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.1), []
    for step in range(steps):
        if before is not None:
            before(step)
        ids, mask = batch(step, rank)
        if monitor is None:
            loss = toy.loss_of(net, ids, mask)
            loss.backward()
        else:
            with monitor.step(step):
                loss = toy.loss_of(net, ids, mask)
                loss.backward()
            monitor.log(loss=loss)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def watch(net: nn.Module, **options: Any) -> tuple[Monitor, Keep]:
    sink, group = Keep(), options.pop("process_group", None) or dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    probe, config = options.pop("probe_batch", None), MonitorConfig(every_n_steps=1, **options)
    return Monitor(net, config, sinks=[sink], process_group=group, probe_batch=probe), sink


def result(monitor: Monitor, sink: Keep, caught: list[warnings.WarningMessage], **more: Any) -> dict[str, Any]:
    """What the tests look at."""
    said = [str(warning.message) for warning in caught if "repflow" in str(warning.message)]
    snapshots = [(s.step, s.sums, dict(s.scalars), s.silent_ranks) for s in sink.snapshots]
    latest = monitor.latest
    last = None if latest is None else (latest.step, latest.sums, dict(latest.scalars), latest.silent_ranks)
    return {"snapshots": snapshots, "latest": last, "said": said, **more}


def wrapped(net: nn.Module, kind: str) -> nn.Module:
    """The model as users train it on several ranks."""
    kind, _, checkpointed = kind.partition(" ")
    if kind == "fsdp2" and checkpointed:  # first what it computes, then how it is sharded; the other way with FSDP1
        checkpoint(net, CheckpointImpl.NO_REENTRANT)
    match kind:
        case "ddp":
            return DistributedDataParallel(net)
        case "fsdp1":
            policy = ModuleWrapPolicy({toy.Block})
            net = FullyShardedDataParallel(net, auto_wrap_policy=policy, device_id=device())
        case "fsdp2":
            for block in net.blocks:  # pyright: ignore[reportGeneralTypeIssues]
                fully_shard(block)
            fully_shard(net)
    if kind == "fsdp1" and checkpointed:
        checkpoint(net, CheckpointImpl.REENTRANT)
    return net


def checkpoint(net: nn.Module, kind: CheckpointImpl) -> None:
    """Wrap each block as FSDP's users do."""
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(net, wrapper, lambda module: isinstance(module, toy.Block))


@contextmanager
def no_waiting(strict: bool) -> Iterator[None]:
    """Where there is a GPU, everything that waits for it raises inside."""
    if device().type == "cuda" and strict:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device().type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
