"""Drift: how far each state has moved from what it was on the same tokens, before."""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from repflow.triton_kernels import hsic_statistics
from repflow.triton_kernels.groups import Groups
from repflow.triton_kernels.hsic import Estimator


class Drift:
    """HSIC of each state with itself now, at the first measurement, and at the one before.

    The states of those two are kept on the CPU, in the dtype of the states: 2·S·n·D numbers for the n tokens of CKA.

    Args:
        estimator: of HSIC.
    """

    def __init__(self, estimator: Estimator) -> None:
        self._estimator: Estimator = estimator
        self._first: Tensor | None = None
        self._previous: Tensor | None = None

    def measure(
        self, states: Float[Tensor, "S R K D"], groups: Bool[Tensor, "R K"] | Groups | None
    ) -> Float64[Tensor, "S 3 3"]:
        """HSIC of every pair of (now, first, previous) for each state, summed over groups; the states are kept.

        At the first measurement the first one is that of now, and row and column of the previous one are 0. It is first
        again where the number of tokens has changed, as when `max_memory_mib` holds fewer of wider states.

        Args:
            states: the same tokens every time.
            groups: valid tokens, or documents; None: all are valid.
        """
        if self._first is not None and self._first.shape != states.shape:
            self.release()
        held = [states] if self._first is None or self._previous is None else [self._first, self._previous]
        result = torch.zeros(len(states), 3, 3, dtype=torch.float64, device=states.device)
        for now, total, *before in zip(states, result, *held, strict=True):
            moved = [state.to(now.device, now.dtype, non_blocking=True) for state in before]
            statistics = hsic_statistics(torch.stack([now, *moved]), groups, estimator=self._estimator)
            unused = ~statistics.usable(self._estimator)
            size = len(moved) + 1
            total[:size, :size] = statistics.hsic.masked_fill(unused.view(-1, 1, 1), 0.0).sum(0)
        self._previous = _on_host(states)
        self._first = self._previous if self._first is None else self._first
        return result

    def release(self) -> None:
        """Forget the states: the next measurement is the first one."""
        self._first = self._previous = None


def _on_host(states: Tensor) -> Tensor:
    """A copy on the CPU. A GPU is not waited for: what reads the copy there comes after it."""
    host = torch.empty(states.shape, dtype=states.dtype, device="cpu", pin_memory=states.is_cuda)
    return host.copy_(states, non_blocking=True)
