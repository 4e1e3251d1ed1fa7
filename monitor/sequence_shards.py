"""Sequences of which each rank holds a slice: unit sums of every slice, added up over the ranks that share them."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor
from torch.nn import Module

from repflow.monitor.config import MonitorConfig
from repflow.monitor.residual_stream import ResidualStream
from repflow.triton_kernels import TokenSums

MAX_SEQUENCES = 64
"""Room for so many sequences of a step: what travels has one shape, whatever the batch."""
_WIDTHS = ("hidden_size", "d_model", "n_embd")
"""Under these names configs keep the number of features D."""


class WholeSequences(NamedTuple):
    """What the slices of all ranks add up to: V = 2S − 1 vectors for each of N places, some of which may be empty."""

    lengths: Float64[Tensor, "V N"]
    """‖Σ_t u_t‖ of the unit vectors of h^(0..L), then of Δh^(0..L−1)."""
    counts: Int64[Tensor, "V N"]
    """How many those are; 0 where a slice of the sequence is missing."""
    sizes: Int64[Tensor, " N"]
    """Valid tokens; 0 where a slice is missing."""
    torn: Bool[Tensor, " N"]
    """Sequences of which a slice is missing, or of which the ranks did not measure the same."""


class _Views(NamedTuple):
    unit_sums: Float32[Tensor, "V N D"]
    counts: Float32[Tensor, "V N"]
    sizes: Float32[Tensor, " N"]
    held: Float32[Tensor, "world 4 N"]
    """A row for each rank, zero on all others. Of the sequence in a place: number of its micro-batch, and of its row,
    from 1; length of the slice if only some of its tokens are measured, otherwise 0; and whether there are unit sums.
    Whole numbers below 2²⁴, which float32 holds exactly."""


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The ranks that hold slices of the same sequences, and the vector that they add up: `size` float32 numbers.

    Float32 suffices: a rank's part of a unit sum is no longer than the number of tokens n, and is rounded by 6e-8 of
    itself, which moves (‖s‖² − n)/(n(n − 1)) by some 1e-7 for each rank at most, and 1e-5 is what is asked of it.
    """

    group: "dist.ProcessGroup"
    """The ranks."""
    num_states: int
    """S = L + 1."""
    features: int
    """D; 0 where no similarity is measured, and sequences are but counted."""

    @cached_property
    def rank(self) -> int:
        """Of this process in the group. What is whole enters the sums of rank 0 alone."""
        return dist.get_rank(self.group)

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        vectors = 2 * self.num_states - 1
        world = dist.get_world_size(self.group)
        return [
            (vectors, MAX_SEQUENCES, self.features),
            (vectors, MAX_SEQUENCES),
            (MAX_SEQUENCES,),
            (world, 4, MAX_SEQUENCES),
        ]

    @cached_property
    def size(self) -> int:
        """Length of the vector."""
        return sum(map(prod, self._shapes))

    def zeros(self, device: torch.device) -> Float32[Tensor, " size"]:
        """What a rank brings that measured nothing."""
        return torch.zeros(self.size, dtype=torch.float32, device=device)

    def views(self, flat: Float32[Tensor, " size"]) -> _Views:
        """The parts of a vector: writing to one writes to the vector."""
        parts = flat.split([prod(shape) for shape in self._shapes])
        return _Views(*(part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)))

    def whole(self, flat: Float32[Tensor, " size"]) -> WholeSequences:
        """What the sum of all ranks' vectors says. Does not wait for the device."""
        unit_sums, counts, sizes, held = self.views(flat)
        sequence, measured = held[:, :3], held[:, 3] > 0
        same = (sequence == sequence[:1]).all(0).all(0) & (sequence[0, 0] > 0)
        similar = same & measured.all(0)
        return WholeSequences(
            torch.linalg.vector_norm(unit_sums, dim=-1, dtype=torch.float64),
            (counts * similar).long(),
            (sizes * same).long(),
            (sequence[:, 0] > 0).any(0) & ~(similar if self.features else same),
        )


class SequenceShards:
    """The slices that this rank measured in one step.

    Sequences take places in the order in which they are measured. The ranks need not agree beforehand on what is in a
    place: each tells, and a sequence counts where all told the same.

    Args:
        group: the ranks.
        device: where the states are.
    """

    def __init__(self, group: SequenceGroup, device: torch.device) -> None:
        self._group = group
        self.flat = group.zeros(device)
        self.left_out = 0
        """Sequences for which there was no room."""
        self._parts = group.views(self.flat)
        self._places = slice(0, 0)

    def check(self, features: int) -> None:
        """Refuse states of another width than was expected.

        Raises:
            ValueError: they are not of D features.
        """
        if self._group.features not in (0, features):
            raise ValueError(
                f"expected states of {self._group.features} features, as the model's config or norm says, got "
                f"{features}; under sequence_group the width must be known before the first forward"
            )

    def place(self, forward: int, rows: Int64[Tensor, " R"], sampled: int, sizes: Int64[Tensor, " R"] | int) -> None:
        """Begin with the slices of some rows.

        Args:
            forward: number of the micro-batch within the step, the same on all ranks.
            rows: which rows of the micro-batch they are.
            sampled: tokens of the slice if only some of them are measured, otherwise 0.
            sizes: valid tokens of each.
        """
        start = self._places.stop
        self._places = slice(start, min(start + len(rows), MAX_SEQUENCES))
        number = self._places.stop - start
        self.left_out += len(rows) - number
        held = self._parts.held[self._group.rank, :, self._places]
        held[0] = forward + 1
        held[1] = rows[:number] + 1
        held[2] = sampled
        self._parts.sizes[self._places] = sizes if isinstance(sizes, int) else sizes[:number].float()

    def add(self, sums: TokenSums) -> None:
        """Keep the unit sums of the rows that were placed last."""
        places, (unit_sums, counts, _, held) = self._places, self._parts
        number, states = places.stop - places.start, self._group.num_states
        unit_sums[:states, places] = sums.unit_sum[:, :number].float()
        unit_sums[states:, places] = sums.update_unit_sum[:, :number].float()
        counts[:states, places] = sums.count[:, :number].float()
        counts[states:, places] = sums.update_count[:, :number].float()
        held[self._group.rank, 3, places] = 1


def find_sequence_group(
    group: "dist.ProcessGroup | None",
    within: "dist.ProcessGroup | None",
    stream: ResidualStream,
    config: MonitorConfig,
    *,
    probe: bool,
) -> SequenceGroup | None:
    """The ranks that hold slices of the same sequences; None where each rank has whole ones.

    Args:
        group: the ranks; None, or a group of one, says that sequences are whole.
        within: the ranks that share a batch; the default group if None.
        stream: whose states are measured.
        config: what is measured of them.
        probe: whether that is a probe batch.

    Raises:
        ValueError: this rank is not in `group`, or `group` not inside of `within`, or the width of the states cannot be
            told before a forward, or something is to be measured that slices do not tell.
    """
    if group is None:
        return None
    if dist.get_rank(group) < 0:
        raise ValueError(
            "`Monitor`: expected sequence_group to be the group that this rank belongs to, got one without it; pass "
            'each rank its own, as mesh["cp"].get_group() is'
        )
    if dist.get_world_size(group) == 1:
        return None
    ranks, outer = (dist.get_process_group_ranks(ranks) for ranks in (group, within or dist.group.WORLD))
    if not set(ranks) <= set(outer):
        raise ValueError(
            f"`Monitor`: expected sequence_group to lie within process_group, got ranks {ranks} and {outer}; pass as "
            "process_group the ranks of both, data and sequence parallel"
        )
    features = stream_width(stream) if "inter_token" in config.metrics else 0
    if features is None:
        raise ValueError(
            "`Monitor`: expected to find the width of the states for sequence_group, which all ranks must know before "
            f"a forward, in the config ({', '.join(_WIDTHS)}) or the norms beside and in '{stream.blocks[0].name}', "
            "got neither; set model.config.hidden_size, or leave 'inter_token' out of metrics"
        )
    _check_sliced(config, probe=probe)
    return SequenceGroup(group, len(stream) + 1, features)


def _check_sliced(config: MonitorConfig, *, probe: bool) -> None:
    """Refuse what cannot be measured of slices of sequences.

    Raises:
        ValueError: there is something of it.
    """
    refused = {
        "probe_batch=": probe,
        f"skip_first_tokens={config.skip_first_tokens}": config.skip_first_tokens > 0,
        "reduce=False": not config.reduce,
    }
    if found := [name for name, given in refused.items() if given]:
        raise ValueError(
            f"`Monitor`: expected none of probe_batch, skip_first_tokens and reduce=False beside sequence_group, got "
            f"{', '.join(found)}: a slice does not tell which tokens are first, and only all ranks together have a "
            "whole sequence"
        )


def stream_width(stream: ResidualStream) -> int | None:
    """D, as far as it can be told without a forward: from the innermost config, the final norm, or a block's norm."""
    for module in reversed(stream.ancestors):
        config = getattr(module, "config", None)
        for name in _WIDTHS:
            if isinstance(width := getattr(config, name, None), int):
                return width
    norms = [stream.final_norm, *stream.blocks[0].module.children()]
    return next((width for norm in norms if norm is not None and (width := _norm_width(norm))), None)


def _norm_width(module: Module) -> int | None:
    weight = getattr(module, "weight", None)
    is_norm = "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1
    return len(weight) if is_norm and isinstance(weight, Tensor) else None
