"""Two processes joined by gloo or NCCL: `python -m tests.monitor.two_ranks FOLDER RANK BACKEND` runs every scenario.

Each scenario has a process group of its own, so that what one leaves behind cannot meet the next.
"""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from repflow.monitor import Monitor, MonitorConfig, RunInfo, Snapshot, ranks
from repflow.monitor.sinks import AbstractSink
from tests.monitor import toy

STEPS = 3


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
    return Monitor(net, MonitorConfig(every_n_steps=1, **options), sinks=[sink], process_group=group), sink


def result(monitor: Monitor, sink: Keep, caught: list[warnings.WarningMessage], **more: Any) -> dict[str, Any]:
    """What the tests look at."""
    said = [str(warning.message) for warning in caught if "repflow" in str(warning.message)]
    snapshots = [(s.step, s.sums, dict(s.scalars), s.silent_ranks) for s in sink.snapshots]
    latest = monitor.latest
    last = None if latest is None else (latest.step, latest.sums, dict(latest.scalars), latest.silent_ranks)
    return {"snapshots": snapshots, "latest": last, "said": said, **more}


def wrapped(net: nn.Module, kind: str) -> nn.Module:
    """The model as users train it on several ranks."""
    match kind:
        case "ddp":
            return DistributedDataParallel(net)
        case "fsdp1":
            policy = ModuleWrapPolicy({toy.Block})
            return FullyShardedDataParallel(net, auto_wrap_policy=policy, device_id=device())
        case "fsdp2":
            for block in net.blocks:  # pyright: ignore[reportGeneralTypeIssues]
                fully_shard(block)
            fully_shard(net)
    return net


def way_of_training(kind: str, rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """With and without the monitor; counts the collectives that the monitor calls, and their sizes."""
    bare = train(None, wrapped(model(), kind), rank)
    net = wrapped(model(), kind)
    monitor, sink = watch(net)
    sizes, group, add_up = [], monitor._group, dist.all_reduce

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


SCENARIOS: dict[str, Callable[[int, list[warnings.WarningMessage]], dict[str, Any]]] = {
    **{kind: partial(way_of_training, kind) for kind in ("plain", "ddp", "fsdp1", "fsdp2")},
    **{
        call.__name__: call
        for call in (
            hook_fails, packing_fails, nothing_to_record, step_raises, ends_with_an_exception, different_steps,
            one_rank_without_a_monitor, not_reduced, late, scalars,
        )
    },
}  # fmt: skip


def run_both(folder: Path, backend: str) -> list[dict[str, dict[str, Any]]]:
    """Start both ranks, wait for them, and return the results of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command, root = [sys.executable, "-m", "tests.monitor.two_ranks", str(folder)], Path(__file__).parents[2]
    ranks = [subprocess.Popen([*command, str(rank), backend], env=environment, cwd=root) for rank in range(2)]
    try:
        assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def main(folder: Path, rank: int, backend: str) -> None:
    store = dist.FileStore(str(folder / "store"), 2)  # pyright: ignore[reportPrivateImportUsage]
    if backend == "nccl":
        torch.cuda.set_device(rank)
        del SCENARIOS["ends_with_an_exception"]  # NCCL's watchdog ends the process
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    for name, scenario in SCENARIOS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results[name] = scenario(rank, caught)
        dist.barrier()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
