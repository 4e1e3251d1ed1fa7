"""The functional forms as streaming torchmetrics: update with batches, merge over ranks, compute once.

The states of a metric are float64 sums. Do not register one as a submodule of a model that is cast to another dtype:
the cast would reach them.
"""

from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torchmetrics import Metric

from repflow.monitor.functional.cka import cka_from_hsic
from repflow.monitor.functional.inter_token import inter_token_similarity
from repflow.triton_kernels import depth_statistics, hsic_statistics
from repflow.triton_kernels.hsic import Estimator

_Mask = Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None


class _SumMetric(Metric):
    """Base of the metrics here: states are sums whose size is fixed at the first update, or by `num_states`.

    Args:
        num_states: S = L + 1. Needed only where a rank may be without any update when the ranks are merged.
        kwargs: options of `torchmetrics.Metric`.

    Raises:
        ValueError: an update or a merge with another number of states than before; compute before any update, when
            that number is not known.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, num_states: int | None = None, **kwargs: Any) -> None:
        if num_states is not None and num_states < 1:
            raise ValueError(f"`{type(self).__name__}`: expected num_states of 1 or more, got {num_states}")
        super().__init__(**kwargs)
        self.num_states = num_states

    def _add_sum(self, name: str, *shape: int) -> None:
        """A sum of that shape; before its size is known, a scalar zero, which addition broadcasts."""
        default = torch.zeros(shape if self.num_states is not None else (), dtype=torch.float64)
        self.add_state(name, default, dist_reduce_fx="sum")

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of another metric.

        Raises:
            ValueError: it has another number of states.
        """
        if isinstance(incoming_state, _SumMetric) and incoming_state.num_states is not None:
            self._fix_num_states(incoming_state.num_states, "merge_state")
        super().merge_state(incoming_state)

    def _fix_num_states(self, num_states: int, method: str) -> None:
        self.num_states = self.num_states or num_states
        if num_states != self.num_states:
            raise ValueError(
                f"`{type(self).__name__}.{method}`: expected {self.num_states} states as before, got {num_states}; "
                "use one metric for each model"
            )

    def _check_known(self) -> None:
        if self.num_states is None:
            raise ValueError(
                f"`{type(self).__name__}.compute`: expected an update first, got none, and so no number of states; "
                "call update, or give num_states="
            )


class InterTokenSimilarity(_SumMetric):
    """Mean over groups of `functional.inter_token_similarity`.

    Every group weighs the same; groups that are too short are skipped.
    `compute()` returns `[S]`, NaN for a state in which no group could be measured.
    """

    total: Tensor
    groups: Tensor

    def __init__(self, num_states: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_states, **kwargs)
        self._add_sum("total", num_states or 0)
        self._add_sum("groups", num_states or 0)

    def update(self, states: Float[Tensor, "S B T D"], mask: _Mask = None) -> None:
        """Add the groups of one batch."""
        similarity = inter_token_similarity(states, mask)
        self._fix_num_states(states.shape[0], "update")
        self.total = self.total + similarity.nansum(1)
        self.groups = self.groups + similarity.isfinite().sum(1)

    def compute(self) -> Float64[Tensor, " S"]:
        """Similarity per state."""
        self._check_known()
        return self.total / self.groups


class AdjacentLayerSimilarity(_SumMetric):
    """Mean over tokens of `functional.adjacent_layer_similarity`; every token weighs the same.

    `compute()` returns `[S-1]`, NaN for a block without a measurable token.
    """

    total: Tensor
    tokens: Tensor

    def __init__(self, num_states: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_states, **kwargs)
        self._add_sum("total", (num_states or 1) - 1)
        self._add_sum("tokens", (num_states or 1) - 1)

    def update(self, states: Float[Tensor, "S B T D"], mask: _Mask = None) -> None:
        """Add the tokens of one batch."""
        cosine = depth_statistics(states, mask).adjacent_cosine.flatten(1).double()
        self._fix_num_states(states.shape[0], "update")
        self.total = self.total + cosine.nansum(1)
        self.tokens = self.tokens + cosine.isfinite().sum(1)

    def compute(self) -> Float64[Tensor, " L"]:
        """Cosine per block."""
        self._check_known()
        return self.total / self.tokens


class LayerVariation(_SumMetric):
    """`functional.layer_local_variance` and `functional.layer_global_variance` over everything seen.

    Every token weighs the same.
    `compute()` returns `{"v_loc": 0-d, "v_glob": 0-d}`.
    """

    local_total: Tensor
    local_count: Tensor
    global_total: Tensor
    global_count: Tensor

    def __init__(self, num_states: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_states, **kwargs)
        for name in ("local_total", "local_count", "global_total", "global_count"):
            self._add_sum(name)

    def update(self, states: Float[Tensor, "S B T D"], mask: _Mask = None) -> None:
        """Add the tokens of one batch."""
        depth = depth_statistics(states, mask)
        self._fix_num_states(states.shape[0], "update")
        self.local_total = self.local_total + depth.curvature.double().nansum()
        self.local_count = self.local_count + depth.curvature.isfinite().sum()
        self.global_total = self.global_total + depth.spread.double().nansum()
        self.global_count = self.global_count + depth.spread.isfinite().sum()

    def compute(self) -> dict[str, Float64[Tensor, ""]]:
        """V_loc and V_glob, in the unit of the states."""
        return {"v_loc": self.local_total / self.local_count, "v_glob": self.global_total / self.global_count}


class LayerCKA(_SumMetric):
    """CKA of every pair of states, from HSIC summed over groups and divided at the end.

    Groups that are too short are skipped and counted, and so are those in which a state has no finite token, as long as
    there are others in the same batch.
    `compute()` returns `[S, S]`, NaN for states without structure. `groups` and `skipped` count the groups.

    Args:
        num_states: S = L + 1; see `_SumMetric`.
        estimator: "unbiased" or "biased"; see `functional.layer_cka`.
        kwargs: options of `torchmetrics.Metric`.

    Raises:
        ValueError: an unknown estimator, or an update with another number of states than before.
    """

    hsic: Tensor
    groups: Tensor
    skipped: Tensor

    def __init__(self, num_states: int | None = None, *, estimator: Estimator = "unbiased", **kwargs: Any) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f'`LayerCKA`: expected estimator="unbiased" or "biased", got {estimator!r}')
        super().__init__(num_states, **kwargs)
        self.estimator: Estimator = estimator
        self._add_sum("hsic", num_states or 0, num_states or 0)
        self._add_sum("groups")
        self._add_sum("skipped")

    def update(self, states: Float[Tensor, "S B T D"], mask: _Mask = None) -> None:
        """Add the groups of one batch."""
        statistics = hsic_statistics(states, mask, estimator=self.estimator)
        self._fix_num_states(states.shape[0], "update")
        enough = statistics.usable(self.estimator)
        self.hsic = self.hsic + torch.where(enough.view(-1, 1, 1), statistics.hsic, 0.0).sum(0)
        self.groups = self.groups + enough.sum()
        self.skipped = self.skipped + (~enough).sum()

    def compute(self) -> Float64[Tensor, "S S"]:
        """CKA of every pair of states."""
        self._check_known()
        return cka_from_hsic(self.hsic)
