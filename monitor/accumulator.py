"""From captured states to sums: every micro-batch of a step is added to one flat vector on the device."""

from collections.abc import Callable
from math import ceil, prod

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from repflow.monitor.captured import CapturedForward
from repflow.monitor.config import Metric, MonitorConfig
from repflow.monitor.drift import Drift
from repflow.monitor.functional.inter_token import mean_pair_cosine
from repflow.monitor.positions import every_position, token_positions, without_first
from repflow.monitor.sampling import select
from repflow.monitor.sequence_shards import SequenceGroup, SequenceShards
from repflow.monitor.ssm import DecayCounts
from repflow.monitor.sum_layout import POSITION_BINS, SumLayout
from repflow.triton_kernels import DepthStatistics, TokenSums, depth_and_token_sums, depth_statistics, hsic_statistics
from repflow.triton_kernels._dispatch import use_triton
from repflow.triton_kernels._inputs import check_mask
from repflow.triton_kernels.groups import Groups, find_groups

_ROOM_BYTES = 256 * 2**20
"""Most that the sums of documents take, beyond those of one for each row."""

_SUM_BYTES = 32 * 2**20
"""Unit sums of this size are held at once, not counting `_ROOM_BYTES`: with many short sequences they would
outgrow the states."""


class Accumulator:
    """The sums of one optimizer step.

    Args:
        config: which metrics, and with which estimator and budget.
        layout: of the sums.
        step: the optimizer step.
        device: where the states are.
        failed: called with the name of a metric and its exception; the other metrics go on.
        documents: whether integer masks may tell documents apart. If not, the kernels take them as padding, which costs
            less, and the largest value is kept: it tells if that was wrong.
        drift: compares the tokens of CKA with what their states were; the layout is then that of a probe.
        sequences: the ranks that hold slices of the same sequences. What is a sum over pairs of tokens is then kept for
            each sequence, in `shards`, and integer masks are read as padding.
    """

    def __init__(
        self,
        config: MonitorConfig,
        layout: SumLayout,
        step: int,
        device: torch.device,
        failed: Callable[[Metric, Exception], None],
        documents: bool = True,
        drift: Drift | None = None,
        sequences: SequenceGroup | None = None,
    ) -> None:
        self._config, self._step, self._failed = config, step, failed
        self._documents = documents and sequences is None
        self._drift = drift
        self.flat = layout.zeros(device)
        self.forwards = 0
        self.counted_documents = False
        """Whether a mask was looked through for documents, of which there is room for so many only."""
        self.shards = None if sequences is None else SequenceShards(sequences, device)
        """What is to be added up over ranks before it is a similarity."""
        self._sums = layout.views(self.flat)

    @torch.no_grad()
    def add(self, forward: CapturedForward, metrics: tuple[Metric, ...], missed: int = 0) -> None:
        """Add the statistics of one micro-batch. Nothing here waits for the device where the kernels run.

        Args:
            forward: the micro-batch.
            metrics: those that have not failed.
            missed: forwards of the step that were not measured so far.
        """
        states = forward.states
        if self.shards is not None:
            self.shards.check(states.shape[-1])
        mask, bins = self._mask_and_bins(forward)
        with torch.autocast(states.device.type, enabled=False):
            num_states, rows, _, features = states.shape
            # Unit sums, of h and Δh, are held for so many rows at once.
            step = max(1, _SUM_BYTES // (16 * num_states * features)) if "inter_token" in metrics else rows
            for start in range(0, rows, step):
                part = slice(start, start + step)
                groups = self._groups(states, None if mask is None else mask[part], self._config.max_documents)
                self._count_tokens(groups, bins[part].shape)
                if self.shards is not None:
                    self._place(self.shards, forward, part, groups, missed)
                self._add_rows(states[:, part], groups, bins[part], metrics)
            if "cka" in metrics:
                try:
                    self._add_cka(states, mask)
                except Exception as error:
                    self._failed("cka", error)
        self.forwards += 1

    @torch.no_grad()
    def add_decays(self, counts: DecayCounts) -> None:
        """Add what one micro-batch counted of its state-space blocks."""
        self._add(ssm_decay_bins=counts.decay, ssm_memory_bins=counts.memory, ssm_nonfinite=counts.nonfinite)

    def _mask_and_bins(self, forward: CapturedForward) -> tuple[Tensor | None, Tensor]:
        """Valid tokens (None: all) and relative positions of the captured part, both from the whole micro-batch."""
        mask, device = forward.mask, forward.states.device
        if mask is None:
            positions = every_position(*forward.shape, device)
        else:
            mask = mask.to(device, non_blocking=True)
            if mask.is_floating_point():
                mask = mask > 0  # given with the step
            if mask.dtype != torch.bool and (use_triton(forward.states) or self.shards is not None):
                mask = mask.clamp(min=0)  # elsewhere a negative number is refused, for which a GPU would be waited for
                self._raise_to("document_max" if self._documents else "mask_max", mask.max())
                mask = mask if self._documents else mask != 0
            positions = token_positions(mask)
        mask = without_first(mask, positions, self._config.skip_first_tokens)
        take = forward.selection.take
        return None if mask is None else take(mask), take(positions.bins(POSITION_BINS))

    def _groups(self, states: Tensor, mask: Tensor | None, room: int) -> Tensor | Groups | None:
        """The mask of some rows, with document numbers turned into groups; `room` is that beyond one for each row."""
        if mask is None or mask.dtype == torch.bool:
            return mask
        if not use_triton(states):
            check_mask("Monitor", states, mask, mask.shape)
            return find_groups(mask)
        num_states, _, _, features = states.shape
        groups = find_groups(mask, len(mask) + min(room, _ROOM_BYTES // (24 * num_states * features)))
        assert groups.found is not None
        self.counted_documents = True
        self._raise_to("documents_left_out", groups.found - groups.count)
        return groups

    def _count_tokens(self, groups: Tensor | Groups | None, shape: tuple[int, ...]) -> None:
        if groups is None:
            rows, tokens = shape
            counts = {"tokens": rows * tokens}
            if self.shards is None:
                counts |= {"sequences": rows, "short_sequences": rows * (tokens < 2)}
            _add_each([self._sums[name] for name in counts], list(counts.values()))
            return
        sizes = groups.sizes if isinstance(groups, Groups) else groups.sum(1)
        tokens = groups.valid.sum() if isinstance(groups, Groups) else sizes.sum()
        self._add(tokens=tokens, **({} if self.shards is not None else count_sequences(sizes)))

    def _place(
        self, shards: SequenceShards, forward: CapturedForward, part: slice, mask: Tensor | Groups | None, missed: int
    ) -> None:
        """Say of which sequences the rows `part` of the captured part are slices."""
        (rows, tokens), selection = forward.shape, forward.selection
        number = torch.arange(rows, device=forward.states.device)
        number = number if selection.rows is None else number[selection.rows]
        sizes = mask.sum(1) if isinstance(mask, Tensor) else selection.shape[1]
        sampled = 0 if selection.tokens is None else tokens
        shards.place(self.forwards + missed, number[part], sampled, sizes)
        self._sums["documents_left_out"].fill_(shards.left_out)

    def _add_rows(
        self, states: Tensor, mask: Tensor | Groups | None, bins: Tensor, metrics: tuple[Metric, ...]
    ) -> None:
        """Everything along depth, and the sums over tokens, which come from the same reads of the states."""
        depth = None
        if "inter_token" in metrics:
            try:
                depth, sums = depth_and_token_sums(states, mask)
                if self.shards is None:
                    self._add_inter_token(sums)
                else:
                    self.shards.add(sums)
            except Exception as error:
                self._failed("inter_token", error)
        self._add_depth(depth or depth_statistics(states, mask), states.shape[-1], bins, metrics)

    def _add_inter_token(self, sums: TokenSums) -> None:
        lengths = [torch.linalg.vector_norm(unit_sum, dim=-1) for unit_sum in (sums.unit_sum, sums.update_unit_sum)]
        self._add(**sum_similarity(torch.cat(lengths), torch.cat([sums.count, sums.update_count])))

    def _add_depth(self, depth: DepthStatistics, features: int, bins: Tensor, metrics: tuple[Metric, ...]) -> None:
        maps = {"norms": depth.norm}
        if "adjacent" in metrics:
            maps["adjacent"] = depth.adjacent_cosine
        if "variation" in metrics:
            maps |= {"local_variance": depth.curvature, "global_variance": depth.spread.unsqueeze(0)}
        rows = [len(entry) for entry in maps.values()]
        finite = _finite(torch.cat([entry.flatten(1) for entry in maps.values()]))  # [2, Σ rows, tokens]
        sums: dict[str, Tensor] = {"nonfinite": depth.nonfinite, "zero": depth.zero}
        for name, (total, count) in zip(maps, finite.sum(-1).split(rows, dim=1), strict=True):
            sums |= {name: total, f"{name}_count": count}
        parts = dict(zip(maps, finite.split(rows, dim=1), strict=True))
        if "adjacent" in parts:
            # A product with one-hot bins: unlike index_add_ on a GPU, it adds in the same order every time.
            one_hot = bins.reshape(-1, 1) == torch.arange(POSITION_BINS, device=bins.device)
            sums["adjacent_tokens"], sums["adjacent_tokens_count"] = parts["adjacent"] @ one_hot.double()
        if "local_variance" in parts:
            sums |= _relative(depth.norm, parts["local_variance"][0], parts["global_variance"][0, 0], features)
        self._add(**sums)

    def _add_cka(self, states: Tensor, mask: Tensor | None) -> None:
        config = self._config
        batch = (states.shape[1], states.shape[2])
        part = select(
            batch,
            config.cka_tokens,
            seed=config.seed,
            step=self._step,
            forward=self.forwards,
        ).to(states.device)
        # Room as for its share of the tokens: the kernels work through all of it.
        room = ceil(config.max_documents * prod(part.shape) / prod(batch))
        # A view of the states, or all of them with the places of what is meant: they are not copied.
        selected = part.positions(batch, states.device)
        groups = self._groups(states, None if mask is None else part.take(mask), room)
        statistics = hsic_statistics(
            part.take(states, dim=1) if selected is None else states,
            groups,
            estimator=config.cka_estimator,
            selected=selected,
        )
        unused = ~statistics.usable(config.cka_estimator)
        self._add(
            hsic=statistics.hsic.masked_fill(unused.view(-1, 1, 1), 0.0).sum(0),
            hsic_groups=(~unused).sum(),
            hsic_short_groups=((statistics.count > 0) & unused).sum(),
            fourth_moment=statistics.fourth_moment.masked_fill(unused.unsqueeze(1), 0.0).sum(0),
        )
        if len(unused):
            self._raise_to(
                "fourth_moment_max", statistics.fourth_moment_max.masked_fill(unused.unsqueeze(1), 0.0).amax(0)
            )
        if self._drift is not None:
            self._add(drift_hsic=self._drift.measure(part.take(states, dim=1), groups))

    def _add(self, **values: Tensor) -> None:
        """Add to the sums of these names."""
        sums = [self._sums[name] for name in values]
        added = [value.double().view_as(total) for value, total in zip(values.values(), sums, strict=True)]
        _add_each(sums, added)

    def _raise_to(self, name: str, value: Tensor) -> None:
        """Raise the maximum of this name to `value`, where that is larger."""
        torch.maximum(self._sums[name], value, out=self._sums[name])


def sum_similarity(length: Float64[Tensor, "V G"], count: Int64[Tensor, "V G"]) -> dict[str, Tensor]:
    """The sums over groups of the similarity of states and of updates (V = 2S − 1), from ‖Σ_t u_t‖ and the tokens."""
    total, groups = _finite(mean_pair_cosine(length, count)).sum(-1)
    states = (len(count) + 1) // 2
    return {
        "inter_token": total[:states],
        "inter_token_groups": groups[:states],
        "update_inter_token": total[states:],
        "update_inter_token_groups": groups[states:],
    }


def count_sequences(sizes: Int64[Tensor, " G"]) -> dict[str, Tensor]:
    """How many groups there are, from their valid tokens."""
    return {"sequences": (sizes > 0).sum(), "short_sequences": (sizes == 1).sum()}


def _add_each(sums: list[Tensor], values: list[Tensor] | list[int]) -> None:
    """Add one value to each sum, all in one launch on a GPU where the dtypes agree."""
    torch._foreach_add_(sums, values)  # pyright: ignore[reportPrivateImportUsage]


def _finite(values: Tensor) -> Tensor:
    """`[2, ...]` in float64: the values, 0 where they are not finite, and 1 where they are."""
    both = torch.empty(2, *values.shape, dtype=torch.float64, device=values.device)
    both[0] = values.nan_to_num(0.0, 0.0, 0.0)
    both[1] = values.abs() < torch.inf  # isfinite would be two launches more
    return both


def _relative(norm: Tensor, local: Tensor, spread: Tensor, features: int) -> dict[str, Tensor]:
    """Sums over tokens of V_loc and V_glob divided by the RMS of the token's states, where that is finite and not 0.

    Args:
        norm: `[S, B, T]`, NaN where a state is not finite.
        local: `[S-2, N]`.
        spread: `[N]`.
        features: D.
    """
    length = torch.linalg.vector_norm(norm.flatten(1), dim=0, dtype=torch.float64)
    inverse = ((len(norm) * features) ** 0.5 / length).nan_to_num(0.0, 0.0, 0.0)
    return {
        "local_variance_relative": (local @ inverse).sum() / max(len(local), 1),
        "global_variance_relative": spread @ inverse,
        "relative_count": (inverse > 0).sum(),
    }
