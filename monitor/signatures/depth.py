"""Signatures of depth that is not used: blocks that do nothing, and layers that are copies of one another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from repflow.monitor.alert import Severity
from repflow.monitor.signatures._base import Reading, Signature
from repflow.monitor.snapshot import BlockInfo, Snapshot


@dataclass(frozen=True, kw_only=True)
class DeadBlocks(Signature):
    """A block hands on what it was given: the adjacent-layer distance 1 − cos is about 0.

    **Rule.** The value of state l + 1 is `adjacent` of block l, the mean over tokens of cos(h^(l), h^(l+1)). A block
    that only scales the state counts, too: the norm before the next block undoes it.

    **Source.** Our convention: .9999 is a turn of less than one degree. In the models of `repflow demo` the largest
    value is .998. Deeper models have smaller updates: with 64 blocks or more look at the curve before trusting the
    default.

    **How to read it.** The block's parameters and its time are spent for nothing. Blocks whose last projection begins
    at zero do nothing at first, on purpose; the warm-up leaves that out.
    """

    name: str = "dead_blocks"
    severity: Severity = "warning"
    patience: int = 3
    warmup_steps: int = 200
    threshold: float = 0.9999
    release: float = 0.9998

    title: ClassVar[str] = "A block does nothing"
    reading: ClassVar[str] = "cosine before and after the block"
    suggestion: ClassVar[str] = (
        "Check that the block is trained (requires_grad, its learning rate, a gate or scale that stays at zero) and "
        "that its output is added to the stream; in a finished model it can be pruned"
    )

    def read(self, snapshot: Snapshot, blocks: Sequence[BlockInfo], past: Float64[Tensor, "N S"]) -> Reading | None:
        """See `Signature.read`."""
        return Reading(values=torch.cat([snapshot.adjacent.new_full((1,), torch.nan), snapshot.adjacent]))

    def show(self, value: float) -> str:
        """With enough digits to tell it from 1."""
        return f"{value:.5f}"


@dataclass(frozen=True, kw_only=True)
class RedundantLayers(Signature):
    """Half of the blocks in a row leave the geometry of the tokens as it is.

    **Rule.** With r the larger of `min_blocks` and ⌈`share`·L⌉, take the lowest CKA of any two of r + 1 neighbouring
    states. The value of a state is the highest of these, over the windows that it lies in: above the threshold, it
    belongs to a run of r blocks between any two states of which CKA is that high.

    **Source.** .98 is our convention, and so is the length of the run. In the models of `repflow demo`, which have 8
    blocks, CKA between states three blocks apart stays above .98 for good; five blocks apart it is above .98 in the
    first 30 steps, and at .95 and less after 100.

    **How to read it.** Up to rotation and scale, and to a shift of all tokens alike, the states of these layers are
    the same: the run does the work of one block. That is so of models that are deeper than their task asks for, and
    of large pretrained ones in the middle. A token that owns CKA (see `dominant_token`) makes all layers look alike:
    then this says nothing.
    """

    name: str = "redundant_layers"
    severity: Severity = "info"
    patience: int = 3
    warmup_steps: int = 200
    threshold: float = 0.98
    release: float = 0.97
    share: float = 0.5
    """Share of the blocks that the run takes up at least."""
    min_blocks: int = 5
    """Length of the run at least. A model with fewer blocks is not judged. Unit: blocks."""

    title: ClassVar[str] = "A run of layers are copies of one another"
    reading: ClassVar[str] = "lowest CKA within a run of layers"
    suggestion: ClassVar[str] = (
        "See the CKA matrix; if no single token owns it (dominant_token), the model may be deeper than its task needs: "
        "compare with fewer blocks, or with a longer training, in which layers usually move apart"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("share", 0 <= self.share <= 1, "from 0 to 1")
        self.check("min_blocks", self.min_blocks >= 1, "1 block or more")

    def read(self, snapshot: Snapshot, blocks: Sequence[BlockInfo], past: Float64[Tensor, "N S"]) -> Reading | None:
        """See `Signature.read`."""
        count, size = len(snapshot.cka), max(self.min_blocks, math.ceil(self.share * len(blocks))) + 1
        if count < size:
            return None
        windows = snapshot.cka.unfold(0, size, 1).unfold(1, size, 1).diagonal().movedim(-1, 0)
        lowest = windows.flatten(1).amin(1)  # [S − size + 1]; NaN where a value is
        values = torch.full((count,), -torch.inf, dtype=torch.float64)
        for start, value in enumerate(lowest.tolist()):
            values[start : start + size].clamp_(min=value)
        return Reading(values=values.masked_fill(values.isinf(), torch.nan))

    def show(self, value: float) -> str:
        """With enough digits to tell it from 1."""
        return f"{value:.4f}"
