"""Which tokens of a forward are measured, within the budgets of tokens and memory."""

from torch import Tensor

from repflow.monitor.buffer import CaptureBuffer
from repflow.monitor.config import MonitorConfig
from repflow.monitor.delivery import MeasuredStep
from repflow.monitor.sampling import Selection, select
from repflow.monitor.warning import WarnOnce


class TokenChoice:
    """Chooses by seed, step and micro-batch.

    Args:
        config: the budgets and the seed.
        num_states: S = L + 1, which `buffer` must hold of each token.
        buffer: what the states are copied into.
        fixed: choose the same tokens on every step, as of a probe batch.
        warn: says where the buffer holds fewer tokens than `config.max_tokens`.
    """

    def __init__(
        self, config: MonitorConfig, num_states: int, buffer: CaptureBuffer, *, fixed: bool, warn: WarnOnce
    ) -> None:
        self._config, self._num_states, self._buffer = config, num_states, buffer
        self._fixed, self._warn = fixed, warn

    def of_forward(self, step: MeasuredStep, batch: tuple[int, int], state: Tensor) -> Selection:
        """What to copy of the next micro-batch of a step, of (B, T) tokens with states like `state`.

        Raises:
            MemoryError: the buffer holds hardly any of them.
        """
        limit = self._config.max_memory_mib
        capacity = self._buffer.capacity(state, self._num_states)
        wanted = min(self._config.max_tokens, batch[0] * batch[1])
        if capacity < min(4, wanted):
            raise MemoryError(
                f"expected max_memory_mib to hold {self._num_states} states of at least 4 tokens, got "
                f"{limit} MiB for {state.shape[-1]} features; raise max_memory_mib"
            )
        if capacity < wanted:
            self._warn(
                f"measures {capacity} tokens of a micro-batch instead of {wanted}: max_memory_mib={limit}", key="memory"
            )
        return self._select(step, batch, min(wanted, capacity))

    def of_decays(self, step: MeasuredStep, captured: tuple[int, int]) -> Selection:
        """What to count decays of, among the (R, K) tokens that are copied of the next micro-batch of a step."""
        return self._select(step, captured, self._config.ssm_tokens)

    def drawn_by(self, step: MeasuredStep) -> int:
        """The number that tokens are drawn by: that of the step, where it may be another choice on each."""
        return 0 if self._fixed else step.number

    def _select(self, step: MeasuredStep, batch: tuple[int, int], tokens: int) -> Selection:
        drawn_by = self.drawn_by(step)
        return select(batch, tokens, seed=self._config.seed, step=drawn_by, forward=step.forwards)
