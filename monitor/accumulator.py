"""From captured states to sums: every micro-batch of a step is added to one flat vector on the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from repflow.monitor.capture import CapturedForward
from repflow.monitor.config import Metric, MonitorConfig
from repflow.monitor.functional.inter_token import mean_pair_cosine
from repflow.monitor.positions import token_positions, without_first
from repflow.monitor.sampling import select
from repflow.monitor.snapshot import POSITION_BINS, SumLayout
from repflow.triton_kernels import depth_statistics, hsic_statistics, token_sums
from repflow.triton_kernels.groups import find_groups

_SUM_BYTES = 32 * 2**20
"""Unit sums of this size are held at once: with many short sequences they would outgrow the states."""


class Accumulator:
    """The sums of one optimizer step.

    Args:
        config: which metrics, and with which estimator and budget.
        layout: of the sums.
        step: the optimizer step.
        device: where the states are.
        failed: called with the name of a metric and its exception; the other metrics go on.
    """

    def __init__(
        self,
        config: MonitorConfig,
        layout: SumLayout,
        step: int,
        device: torch.device,
        failed: Callable[[Metric, Exception], None],
    ) -> None:
        self._config, self._step, self._failed = config, step, failed
        self.flat = layout.zeros(device)
        self.forwards = 0
        self._sums = layout.views(self.flat)

    @torch.no_grad()
    def add(self, forward: CapturedForward, metrics: tuple[Metric, ...]) -> None:
        """Add the statistics of one micro-batch.

        Nothing here waits for the device, unless a mask of document numbers is on one.
        """
        states = forward.states
        mask, bins = self._mask_and_bins(forward)
        with torch.autocast(states.device.type, enabled=False):
            self._count_tokens(mask)
            self._add_depth(states, mask, bins, metrics)
            for metric, add in (("inter_token", self._add_inter_token), ("cka", self._add_cka)):
                if metric in metrics:
                    try:
                        add(states, mask)
                    except Exception as error:
                        self._failed(metric, error)
        self.forwards += 1

    def _mask_and_bins(self, forward: CapturedForward) -> tuple[Tensor, Tensor]:
        """Valid tokens and relative positions of the captured part, both from the whole micro-batch."""
        mask, device = forward.mask, forward.states.device
        if mask is None:
            mask = torch.ones(forward.shape, dtype=torch.bool, device=device)
        mask = mask.to(device, non_blocking=True)
        if mask.is_floating_point():
            mask = mask > 0  # given with the step
        if device.type != "cpu" and mask.dtype != torch.bool:
            # Telling documents from padding would wait for the device: the value is looked at when the results arrive.
            self._sums["mask_max"].copy_(torch.maximum(self._sums["mask_max"], mask.max()))
            mask = mask != 0
        positions = token_positions(find_groups(mask))
        kept = without_first(mask, positions, self._config.skip_first_tokens)
        return forward.selection.take(kept), forward.selection.take(positions.bins(POSITION_BINS))

    def _count_tokens(self, mask: Tensor) -> None:
        groups = find_groups(mask)
        index = torch.where(groups.index < 0, groups.count, groups.index).flatten()
        sizes = index.new_zeros(groups.count + 1).index_add_(0, index, torch.ones_like(index))[:-1]
        self._sums["tokens"] += sizes.sum()
        self._sums["sequences"] += (sizes > 0).sum()
        self._sums["short_sequences"] += ((sizes > 0) & (sizes < 2)).sum()

    def _add_depth(self, states: Tensor, mask: Tensor, bins: Tensor, metrics: tuple[Metric, ...]) -> None:
        depth = depth_statistics(states, mask)
        sums = self._sums
        sums["nonfinite"] += depth.nonfinite
        sums["zero"] += depth.zero
        norm = depth.norm.flatten(1).double()
        _add_mean(sums, "norms", norm)
        if "adjacent" in metrics:
            cosine = depth.adjacent_cosine.flatten(1).double()
            _add_mean(sums, "adjacent", cosine)
            index = bins.flatten()
            sums["adjacent_tokens"].index_add_(1, index, cosine.nan_to_num(0.0))
            sums["adjacent_tokens_count"].index_add_(1, index, cosine.isfinite().double())
        if "variation" in metrics:
            local, spread = depth.curvature.flatten(1).double(), depth.spread.flatten().double()
            _add_mean(sums, "local_variance", local)
            _add_mean(sums, "global_variance", spread)
            rms = (norm.square().sum(0) / (states.shape[0] * states.shape[-1])).sqrt()
            rms = torch.where(rms > 0, rms, torch.nan)
            sums["local_variance_relative"] += (local.mean(0) / rms).nansum() if len(local) else 0.0
            sums["global_variance_relative"] += (spread / rms).nansum()
            sums["relative_count"] += rms.isfinite().sum()

    def _add_inter_token(self, states: Tensor, mask: Tensor) -> None:
        num_states, rows, _, features = states.shape
        step = max(1, _SUM_BYTES // (16 * num_states * features))  # rows whose unit sums, of h and Δh, fit
        for start in range(0, rows, step):
            sums = token_sums(states[:, start : start + step], mask[start : start + step])
            similarity = mean_pair_cosine(sums.unit_sum, sums.count)
            _add_mean(self._sums, "inter_token", similarity, "groups")
            similarity = mean_pair_cosine(sums.update_unit_sum, sums.update_count)
            _add_mean(self._sums, "update_inter_token", similarity, "groups")

    def _add_cka(self, states: Tensor, mask: Tensor) -> None:
        config = self._config
        part = select(
            (states.shape[1], states.shape[2]),
            config.cka_tokens,
            seed=config.seed,
            step=self._step,
            forward=self.forwards,
        ).to(states.device)
        chosen = part.take(states.movedim(0, 2)).movedim(2, 0)
        statistics = hsic_statistics(chosen, part.take(mask), estimator=config.cka_estimator)
        enough = statistics.usable(config.cka_estimator)
        sums = self._sums
        sums["hsic"] += torch.where(enough.view(-1, 1, 1), statistics.hsic, 0.0).sum(0)
        sums["hsic_groups"] += enough.sum()
        sums["hsic_short_groups"] += ((statistics.count > 0) & ~enough).sum()
        sums["fourth_moment"] += torch.where(enough.unsqueeze(1), statistics.fourth_moment, 0.0).sum(0)
        largest = torch.where(enough.unsqueeze(1), statistics.fourth_moment_max, 0.0)
        if len(largest):
            torch.maximum(sums["fourth_moment_max"], largest.amax(0), out=sums["fourth_moment_max"])


def _add_mean(sums: dict[str, Tensor], name: str, values: Tensor, unit: str = "count") -> None:
    """Add `values`, whose last dimension is summed over, to the sum `name`, and how many were finite to its count."""
    finite = values.isfinite()
    sums[name] += torch.where(finite, values, 0.0).sum(-1)
    sums[f"{name}_{unit}"] += finite.sum(-1)
