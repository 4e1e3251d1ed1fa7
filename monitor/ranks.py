"""The sums of a step over the ranks that share a batch: one collective of fixed shape per published step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from hashlib import blake2b
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float32, Float64
from torch import Tensor
from torch.nn import Module

from repflow.monitor.accumulator import count_sequences, sum_similarity
from repflow.monitor.delivery import MeasuredStep, Ready, copy_to_host, mean, on_device
from repflow.monitor.sequence_shards import SequenceGroup
from repflow.monitor.sum_layout import SumLayout

MAX_SCALARS = 16
"""Most scalars of a training loop that are averaged over ranks."""
_JOIN_TIMEOUT = timedelta(seconds=60)
"""How long the first published step waits for the Monitors of other ranks. They joined when it began."""


class CollectiveError(RuntimeError):
    """The ranks cannot be reached any more."""


class Part(IntEnum):
    """What a rank brings to a published step."""

    MEASURED = 1
    NOTHING = 2
    """No forward was recorded: its batch was empty, or its step raised."""
    STOPPED = 3
    """Its monitor failed. It brings zeros from then on, so that the others need not wait."""


class Packed(NamedTuple):
    """What a rank brings to the collectives of a step."""

    wire: Float64[Tensor, " size"]
    """To be added up over all ranks."""
    slices: Float32[Tensor, " n"] | None
    """To be added up before that over the ranks that hold slices of the same sequences."""


@dataclass(frozen=True, eq=False)
class Merged:
    """A step as all ranks together measured it."""

    values: Float64[Tensor, " n"]
    """The sums, and behind them the mean of each scalar that this rank logged."""
    parts: dict[int, Part]
    """What each rank brought."""
    steps: dict[int, int]
    """The number of the step that each rank published."""

    @property
    def silent(self) -> tuple[int, ...]:
        """Ranks that brought nothing."""
        return tuple(rank for rank, part in self.parts.items() if part != Part.MEASURED)

    @property
    def same_step(self) -> bool:
        """Whether all published the same step. If not, the values are a mixture."""
        return len(set(self.steps.values())) == 1


class Ranks:
    """The ranks of a process group, each with a Monitor that publishes the same steps.

    The sums travel as one vector of `size` float64 numbers, which is added up over ranks. What is not merged by
    addition travels in rows, one of each rank, that are zero on all others: the maxima, the scalars with hashes of
    their names, the number of the step and what the rank brings. Every rank adds the same numbers and has the same
    result.

    Where ranks hold slices of the same sequences, these are first added up over such ranks, in one more collective, and
    enter the sums of one of them: similarity is no sum over slices.

    Args:
        layout: of the sums.
        group: the ranks.
        device: of the vector.
        key: what must agree between the Monitors of the ranks.
        sequences: those of the ranks that hold slices of the same sequences; None where all have whole ones.
    """

    def __init__(
        self,
        layout: SumLayout,
        group: "dist.ProcessGroup",
        device: torch.device,
        key: str,
        sequences: SequenceGroup | None = None,
    ) -> None:
        self._layout, self._group, self._device, self._sequences = layout, group, device, sequences
        self._aside: torch.cuda.Stream | None = None
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._maxima = layout.size - layout.num_sums
        self._width = 2 + self._maxima + 2 * MAX_SCALARS
        self.size = layout.num_sums + self.world * self._width
        self._agreed: bool | None = None
        # A rank may be without a Monitor: a collective would then meet one of the training loop. So the ranks first
        # count themselves in the group's store, which waits for nobody.
        self._store = group.get_group_store()
        number = self._store.add(f"repflow/{self.rank}", 1)
        self._key = f"repflow/{key}/{number}"
        if self._store.add(self._key, 1) == self.world:
            self._store.set(f"{self._key}/complete", "1")

    def agreed(self) -> bool:
        """Whether all ranks have joined: the same answer on all that have.

        Waits when it is first asked, a minute at most.
        """
        if self._agreed is None:
            try:
                self._store.wait([f"{self._key}/complete"], _JOIN_TIMEOUT)
                own = "yes"
            except RuntimeError:  # which one depends on the store
                own = "no"
            with _explained():
                self._agreed = self._store.compare_set(f"{self._key}/decision", "", own) == b"yes"
        return self._agreed

    @torch.no_grad()
    def pack(self, step: MeasuredStep, part: Part) -> Packed:
        """The vectors of this rank. Does not wait for the device."""
        with on_device(self._device):
            slices = None if self._sequences is None else self._slices(step, self._sequences)
            wire = torch.zeros(self.size, dtype=torch.float64, device=self._device)
            sums = self._layout.num_sums
            row = wire[sums:].view(self.world, self._width)[self.rank]
            names = list(step.scalars)[:MAX_SCALARS]
            head = torch.tensor([step.number, part, *map(_hashed, names)], dtype=torch.float64, device="cpu")
            if self._device.type == "cuda":
                head = head.pin_memory()
            row[:2].copy_(head[:2], non_blocking=True)
            row[2 + self._maxima :][: len(names)].copy_(head[2:], non_blocking=True)
            for slot, name in enumerate(names):
                row[2 + self._maxima + MAX_SCALARS + slot] = mean(step.scalars[name], self._device)[0]
            if step.sums is not None:
                step.wait_for_events()
                flat = step.sums.flat.to(self._device, non_blocking=self._device.type == "cuda")
                wire[:sums] = flat[:sums]
                row[2 : 2 + self._maxima] = flat[sums:]
        return Packed(wire, slices)

    def _slices(self, step: MeasuredStep, sequences: SequenceGroup) -> Float32[Tensor, " n"]:
        """The slices of this rank; zeros where it has none, so that the others need not wait."""
        if step.sums is None or step.sums.shards is None:
            return sequences.zeros(self._device)
        step.wait_for_events()
        shards, step.sums.shards = step.sums.shards, None  # large, and of no use while the step is on its way
        return shards.flat.to(self._device, non_blocking=self._device.type == "cuda")

    def reduce(self, packed: Packed) -> tuple[Tensor, Ready]:
        """Start adding the vectors of all ranks; the sum on the host, and when it is there.

        Neither the host nor, on a GPU, the stream of the training run waits for other ranks. On the CPU, the host waits
        for those that hold slices of the same sequences, as their model did in each of its layers.
        """
        wire, slices = packed
        with _explained():
            if wire.device.type != "cuda":
                self._join_slices(wire, slices)
                return wire, _WorkDone(_add_up(wire, self._group))
            with on_device(wire.device):
                self._aside = self._aside or torch.cuda.Stream()
                self._aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._aside):
                    self._join_slices(wire, slices)
                    _add_up(wire, self._group).wait()  # makes the stream wait, not the host
                    for sent in (wire, slices):
                        if sent is not None:
                            sent.record_stream(self._aside)
                    return copy_to_host(wire)

    @torch.no_grad()
    def _join_slices(self, wire: Float64[Tensor, " size"], slices: Float32[Tensor, " n"] | None) -> None:
        """Add up the slices of each sequence; what is whole enters the `wire` of one of the ranks that have it."""
        if self._sequences is None or slices is None:
            return
        _add_up(slices, self._sequences.group).wait()
        if self._sequences.rank != 0:
            return
        whole = self._sequences.whole(slices)
        flat, sums = self._layout.zeros(wire.device), self._layout.num_sums
        named = self._layout.views(flat)
        for name, value in (sum_similarity(whole.lengths, whole.counts) | count_sequences(whole.sizes)).items():
            named[name].copy_(value)
        named["documents_left_out"].copy_(whole.torn.sum())
        wire[:sums] += flat[:sums]
        wire[sums:].view(self.world, self._width)[self.rank, 2 : 2 + self._maxima] += flat[sums:]

    def merge(self, wire: Float64[Tensor, " size"], scalars: Sequence[str]) -> Merged:
        """What a sum of all vectors says; `scalars` are the names that this rank logged."""
        sums = self._layout.num_sums
        rows = wire[sums:].view(self.world, self._width)
        numbers, parts, maxima, hashes, means = rows.split([1, 1, self._maxima, MAX_SCALARS, MAX_SCALARS], dim=1)
        averages = [means[hashes == _hashed(name)].mean() for name in scalars]
        return Merged(
            torch.cat([wire[:sums], maxima.amax(0), *(value.reshape(1) for value in averages)]),
            {rank: Part(int(part)) for rank, part in enumerate(parts)},
            {rank: int(number) for rank, number in enumerate(numbers)},
        )


def find_ranks(
    layout: SumLayout,
    group: "dist.ProcessGroup | None",
    block: Module,
    key: str,
    sequences: SequenceGroup | None = None,
) -> Ranks | None:
    """The ranks of `group`, or of the default group; None where there is no other rank.

    Args:
        layout: of the sums.
        group: the ranks; None for the default group.
        block: a block of the stream, whose parameters tell the device.
        key: what must agree between the Monitors of the ranks.
        sequences: those of the ranks that hold slices of the same sequences.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = group or dist.group.WORLD
    if group is None or dist.get_rank(group) < 0 or dist.get_world_size(group) == 1:
        return None
    # The same device type on all ranks, also on one that sees no states: parameters tell it, not the batch.
    device = next((parameter.device for parameter in block.parameters()), torch.device("cpu"))
    supported = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    if device.type not in supported:  # parameters that are offloaded to the host
        device = (
            torch.device("cuda", torch.cuda.current_device()) if "cuda" in supported else torch.device(supported[0])
        )
    return Ranks(layout, group, device, key, sequences)


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


class _WorkDone:
    """The end of a collective on the host, with the methods of a `torch.cuda.Event`."""

    def __init__(self, work: "dist.Work") -> None:
        self._work = work

    def query(self) -> bool:
        return self._work.is_completed()

    def synchronize(self) -> None:
        with _explained():
            self._work.wait()


def _add_up(wire: Tensor, group: "dist.ProcessGroup") -> "dist.Work":
    work = dist.all_reduce(wire, group=group, async_op=True)
    assert work is not None  # this rank belongs to the group
    return work


@contextmanager
def _explained() -> Iterator[None]:
    """Turn the errors of torch.distributed into one that says what to do."""
    try:
        yield
    except Exception as error:
        raise CollectiveError(
            f"the sums could not be added up over ranks ({type(error).__name__}: {error}); look for what ended another "
            "rank, and close monitors before `destroy_process_group`"
        ) from error


def _hashed(name: str) -> int:
    """48 bits of a name, not 0: exact in float64."""
    return int.from_bytes(blake2b(name.encode(), digest_size=6).digest(), "little") or 1
