"""One forward of the model: while its states are recorded, and once they are whole."""

from dataclasses import dataclass

import torch
from torch import Tensor

from repflow.monitor.buffer import CaptureBuffer
from repflow.monitor.sampling import Selection


@dataclass(eq=False)
class Recording:
    """A forward that is being recorded."""

    view: Tensor
    states: tuple[Tensor, ...]
    """`view` by state: indexing it in every hook would cost more."""
    selections: dict[torch.device, Selection]
    shape: tuple[int, int, int]
    """(B, T, D) of every state."""
    flat_tokens: bool
    mask: Tensor | None
    filled: int = 0
    """States so far: block `filled` - 1 is running."""

    def selection(self, device: torch.device) -> Selection:
        """What is kept of the forward, on `device`."""
        if device not in self.selections:
            self.selections[device] = self.selections[self.view.device].to(device)
        return self.selections[device]

    def widen(self, buffer: CaptureBuffer, dtype: torch.dtype) -> bool:
        """Hold states of `dtype`, with what was recorded so far; False if `buffer` has no room for that."""
        if dtype != self.view.dtype:
            wider = buffer.widen(self.view, dtype)
            if wider is None:
                return False
            self.view, self.states = wider, wider.unbind()
        return True


@dataclass(frozen=True, eq=False)
class CapturedForward:
    """The states of one micro-batch, valid until the next forward begins."""

    states: Tensor
    """`[S, R, K, D]`: R sequences and K tokens of each, chosen by `selection`."""
    mask: Tensor | None
    """`[B, T]` of the whole micro-batch, as the model received it, or as it was given."""
    selection: Selection
    """Which rows and tokens of the micro-batch `states` holds."""
    shape: tuple[int, int]
    """(B, T) of the whole micro-batch."""
