"""What each of two ranks does that hold slices of the same sequences, and what one process has of the whole batch."""

import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from repflow.monitor import Monitor, MonitorConfig, Snapshot, ranks
from repflow.monitor.functional import inter_token_similarity
from repflow.monitor.sampling import select
from tests.monitor import toy
from tests.monitor.rank_training import Keep, device, model, no_waiting, result

STEPS = 3


@dataclass(frozen=True)
class Sliced:
    """What is measured in each step. The weights stay as they are."""

    batches: tuple[tuple[int, int, int], ...]
    """Of each micro-batch: rows, tokens, and where sequences are cut in two."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the config of a rank."""
    whole: dict[str, Any] = field(default_factory=dict)
    """Of the config of one process that measures the same."""
    fails: bool = False
    """A hook of rank 1 fails in step 1."""
    misses: bool = False
    """The first micro-batch of step 1 is in evaluation mode on rank 1."""
    documents: bool = False
    """Masks have document numbers from step 1 on."""
    width: int | None = None
    """Width of the states by the model's config."""


WITHOUT = {"metrics": ("adjacent", "variation")}
EQUAL = {
    "two micro-batches": Sliced(((4, 12, 6), (3, 16, 8))),
    "unequal slices": Sliced(((4, 12, 5), (3, 16, 13))),
    "chosen rows": Sliced(((9, 12, 6),), {"max_tokens": 18}, {"max_tokens": 36}),
    "without similarity": Sliced(((4, 12, 6),), WITHOUT, WITHOUT),
}
"""These equal one process on the whole batch."""
OTHERS = {
    "chosen tokens": Sliced(((1, 40, 20),), {"max_tokens": 8}),
    "tokens of unequal slices": Sliced(((1, 40, 15),), {"max_tokens": 8}),
    "chosen differently": Sliced(((9, 12, 5),), {"max_tokens": 18}),
    "more than there is room for": Sliced(((50, 8, 4), (20, 8, 4))),
    "a hook fails": Sliced(((4, 12, 6),), fails=True),
    "a forward is missed": Sliced(((4, 12, 6), (4, 12, 6)), misses=True),
    "documents": Sliced(((4, 12, 6),), documents=True),
    "another width": Sliced(((4, 12, 6),), width=8),
}


def batch(step: int, number: int, rows: int, tokens: int, where: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Ids and a mask with padding on the right: of some rows nothing is left in the second slice."""
    ids = toy.batch(rows, tokens, seed=100 * step + number)
    lengths = (tokens - 4 * torch.arange(rows) % (tokens + 1)).clamp(min=1) if rows > 1 else torch.tensor([tokens])
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    return ids.to(where or device()), mask.to(where or device())


def train(case: Sliced, net: nn.Module, monitor: Monitor | None, rank: int) -> list[Tensor]:
    """The gradients of each step, on the slices of a rank."""
    grads = []
    for step in range(STEPS):
        net.zero_grad()
        for number, (rows, tokens, cut) in enumerate(case.batches):
            part = slice(cut) if rank == 0 else slice(cut, None)
            ids, mask = (values[:, part] for values in batch(step, number, rows, tokens))
            if case.documents and step:
                mask = mask + (torch.arange(mask.shape[1], device=mask.device) > 2) * mask
            net.train(not (case.misses and rank == 1 and step == 1 and number == 0))
            if monitor is None:
                toy.loss_of(net, ids, mask).backward()
            else:
                with monitor.step(step):
                    toy.loss_of(net, ids, mask).backward()
        if monitor is not None:
            with no_waiting(step > 0):
                monitor.publish()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    return grads


def new_group() -> dist.ProcessGroup:
    """All ranks, in a group of their own."""
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


def sliced(case: Sliced, rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """With and without the monitor; counts the collectives that it calls, and their sizes."""
    bare, net, sink = train(case, model(), None, rank), model(), Keep()
    if case.width is not None:
        net.config = SimpleNamespace(hidden_size=case.width)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    everyone, slices = new_group(), new_group()
    config = MonitorConfig(every_n_steps=1, **case.options)
    monitor = Monitor(net, config, sinks=[sink], process_group=everyone, sequence_group=slices)
    sizes: list[tuple[str, int, torch.dtype]] = []
    add_up, store = dist.all_reduce, monitor._capture._store

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        sizes.append(("slices" if group is slices else "everyone", tensor.numel(), tensor.dtype))
        return add_up(tensor, *args, **kwargs)

    def failing(*args: Any) -> None:
        if case.fails and rank == 1 and monitor._current().number == 1:
            raise RuntimeError("planted")
        store(*args)

    monitor._capture._store = failing  # pyright: ignore[reportAttributeAccessIssue]
    with patch.object(dist, "all_reduce", counting):
        grads = train(case, net, monitor, rank)
        monitor.close()
    return result(monitor, sink, caught, same=all(map(torch.equal, bare, grads)), sizes=sizes)


def whole(case: Sliced) -> list[Snapshot]:
    """What one process measures of whole sequences."""
    net, sink = model(torch.device("cpu")), Keep()
    monitor = Monitor(net, MonitorConfig(every_n_steps=1, **case.whole), sinks=[sink])
    for step in range(STEPS):
        for number, (rows, tokens, _) in enumerate(case.batches):
            with monitor.step(step):
                toy.loss_of(net, *batch(step, number, rows, tokens, torch.device("cpu"))).backward()
    monitor.close()
    return sink.snapshots


def expected_similarity(case: Sliced, step: int) -> tuple[Tensor, int]:
    """Mean similarity of h^(0..L) over the first 64 sequences of which both ranks choose the same, and their number."""
    net, found = model(torch.device("cpu")), []
    seen = toy.record_states(net)
    for number, (rows, tokens, cut) in enumerate(case.batches):
        seen.clear()
        ids, mask = batch(step, number, rows, tokens, torch.device("cpu"))
        net(ids)
        budget = MonitorConfig(**case.options).max_tokens
        chosen = [select((rows, length), budget, seed=0, step=step, forward=number) for length in (cut, tokens - cut)]
        pairs = zip(*(torch.arange(rows)[... if part.rows is None else part.rows] for part in chosen), strict=False)
        kept = [int(a) for a, b in pairs if a == b]
        places = [
            torch.arange(length) if part.tokens is None else part.tokens
            for part, length in zip(chosen, (cut, tokens - cut), strict=True)
        ]
        columns = torch.cat([places[0], places[1] + cut])
        found.append(inter_token_similarity(torch.stack(seen)[:, kept][:, :, columns], mask[kept][:, columns] != 0))
    similarity = torch.cat(found, dim=1)[:, :64]
    return similarity.nanmean(1), similarity.shape[1]


def refusals(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """What the monitor says of arguments that do not go with a sequence_group."""
    del caught
    slices, own = dist.new_group(), [dist.new_group([number]) for number in range(2)]

    def said(net: nn.Module, options: dict[str, Any], **given: Any) -> str:
        try:
            Monitor(net, MonitorConfig(**options), **{"sequence_group": slices, **given})
        except ValueError as error:
            return str(error)
        return "nothing"

    narrow = model()
    narrow.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "skip": said(model(), {"skip_first_tokens": 1}),
        "alone": said(model(), {"reduce": False}),
        "probe": said(model(), {}, probe_batch=toy.batch()),
        "within": said(model(), {}, process_group=own[rank]),
        "another's": said(model(), {}, sequence_group=own[1 - rank]),
        "width": said(narrow, {}),
        "of one": said(model(), {"skip_first_tokens": 1}, sequence_group=own[rank]),
    }


def unlike(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Rank 1 does not name the ranks that hold slices: their collectives would not meet."""
    net, sink = model(), Keep()
    everyone, slices = new_group(), new_group()
    config, named = MonitorConfig(every_n_steps=1), slices if rank == 0 else None
    monitor = Monitor(net, config, sinks=[sink], process_group=everyone, sequence_group=named)
    with patch.object(ranks, "_JOIN_TIMEOUT", timedelta(seconds=1)):
        train(EQUAL["two micro-batches"], net, monitor, rank)
    monitor.close()
    return result(monitor, sink, caught)


class Numbered(toy.Toy):
    """Is told the number of each token's document."""

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        del seq_idx
        return super().forward(ids, attention_mask)


def numbered(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Documents end where slices end, so that no slice holds two. On step 0 a mask stands for their numbers."""
    net, sink = Numbered(blocks=4).to(device()), Keep()
    monitor = Monitor(net, MonitorConfig(every_n_steps=1), sinks=[sink], sequence_group=new_group())
    ids, mask = (values[:, 6 * rank :][:, :6] for values in batch(0, 0, 4, 12))
    with monitor.step(0, mask=mask != 0):
        net(ids, seq_idx=torch.full_like(ids, rank)).sum().backward()
    with monitor.step(1):
        net(ids, seq_idx=torch.full_like(ids, rank)).sum().backward()
    monitor.close()
    return result(monitor, sink, caught)


def two_by_two(rank: int, caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    """Two pairs of ranks, each with a batch of its own that it has cut in two. Rank 3 has nothing on step 2."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("data", "slices"))
    net, sink = model(), Keep()
    monitor = Monitor(net, MonitorConfig(every_n_steps=1), sinks=[sink], sequence_group=mesh["slices"].get_group())
    pair, part = divmod(rank, 2)
    for step in range(STEPS):
        ids, mask = (values[:, part * 6 :][:, :6] for values in batch(step, pair, 3 + pair, 12))
        with monitor.step(step):
            if not (rank == 3 and step == 2):
                toy.loss_of(net, ids, mask).backward()
    monitor.close()
    return result(monitor, sink, caught)


SLICED = {name: partial(sliced, case) for name, case in (EQUAL | OTHERS).items()}
SLICED |= {"refusals": refusals, "unlike": unlike, "numbered": numbered}
ON_FOUR = {"two by two": two_by_two}
