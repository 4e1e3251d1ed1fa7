"""Signatures of tokens that become alike: early in attention blocks, late in state-space blocks, and suddenly."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from repflow.monitor.alert import Severity
from repflow.monitor.signatures._base import Reading, Signature, states_of, usual
from repflow.monitor.snapshot import BlockInfo, Snapshot


@dataclass(frozen=True, kw_only=True)
class _InPartOfDepth(Signature):
    """Inter-token similarity after the blocks of some kinds in a part of depth."""

    depth: float
    kinds: tuple[str, ...]

    reading: ClassVar[str] = "inter-token similarity"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("depth", 0 < self.depth <= 1, "above 0 and at most 1")
        self.check("kinds", not isinstance(self.kinds, str), "a tuple of kinds of blocks")

    @abstractmethod
    def part(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        """The blocks that are looked at, of any kind."""

    def read(self, snapshot: Snapshot, blocks: Sequence[BlockInfo], past: Float64[Tensor, "N S"]) -> Reading | None:
        """See `Signature.read`."""
        outputs = [block.index + 1 for block in self.part(blocks) if block.kind in self.kinds]
        return Reading(values=states_of(snapshot.inter_token, outputs)) if outputs else None


@dataclass(frozen=True, kw_only=True)
class EarlyOversmoothing(_InPartOfDepth):
    """Attention blocks in the first third of depth make the tokens of a sequence alike.

    **Rule.** The value of a state is `inter_token`, the mean cosine over pairs of tokens of a sequence (Eq. 2 of
    arXiv 2510.06640). Looked at are the outputs of the first ⌈`depth`·L⌉ of L blocks that are of one of the `kinds`.

    **Source.** In Figure 2 of the paper transformers rise to about .9 in their first layers and stay there; .80 as the
    sign that tokens are smoothed before later layers can tell them apart is the reading of a digest of the paper, not a
    measured border. That release, patience and warm-up keep it quiet on healthy runs is measured: the transformer of
    `repflow demo` reaches .85 in its first ten steps, while it learns how frequent each byte is, and is at .34 after
    100.

    **How to read it.** Few directions are left by which later blocks tell tokens apart. Many pretrained transformers
    are like that for good and work: then it is a trait of the model, to be compared between runs. In a model that you
    train from scratch, and that did not start like that, it is a failure under way.
    """

    name: str = "early_oversmoothing"
    severity: Severity = "warning"
    patience: int = 3
    warmup_steps: int = 200
    threshold: float = 0.80
    release: float = 0.75
    depth: float = 1 / 3
    """Share of the blocks, from the first on, that is looked at."""
    kinds: tuple[str, ...] = ("attention", "hybrid")
    """Kinds of blocks that are looked at; a `hybrid` block has attention and another mixer."""

    title: ClassVar[str] = "Tokens become alike early in depth"
    suggestion: ClassVar[str] = (
        "Compare with the curve of the first snapshot: a pretrained model may be like that for good. In training from "
        "scratch look at the learning rate and its warm-up, at the scale of embeddings and initialisation, and at the "
        "norms before attention; blocks that keep tokens apart (state-space, convolution) early in depth help too"
    )

    def part(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        """The first ⌈`depth`·L⌉."""
        return blocks[: math.ceil(self.depth * len(blocks))]


@dataclass(frozen=True, kw_only=True)
class LateHomogenisation(_InPartOfDepth):
    """State-space blocks in the last quarter of depth make the tokens of a sequence alike.

    **Rule.** The value of a state is `inter_token` (Eq. 2 of arXiv 2510.06640), as for `early_oversmoothing`. Looked
    at are the outputs of the last ⌈`depth`·L⌉ of L blocks that are of one of the `kinds`.

    **Source.** In Figure 2 of the paper state-space models keep tokens apart for most of their depth and rise at the
    end (Mamba2-2.7B to .8); .70 as the sign that their state is saturated is the reading of a digest of the paper, not
    a measured border. The paper measured Mamba and Mamba-2; that other recurrent blocks are judged alike is our choice.
    The state-space model and the hybrid of `repflow demo` reach .96 in their first ten steps, and are at .25 after 100:
    hence the warm-up.

    **How to read it.** What the last blocks hand to the head hardly depends on the token any more. Long contexts
    suffer first.
    """

    name: str = "late_homogenisation"
    severity: Severity = "warning"
    patience: int = 3
    warmup_steps: int = 200
    threshold: float = 0.70
    release: float = 0.65
    depth: float = 1 / 4
    """Share of the blocks, up to the last, that is looked at."""
    kinds: tuple[str, ...] = ("ssm", "recurrent", "hybrid")
    """Kinds of blocks that are looked at."""

    title: ClassVar[str] = "Tokens become alike in the last state-space blocks"
    suggestion: ClassVar[str] = (
        "Look at ssm_memory and ssm_decay of these blocks: memory far longer than the sequence averages all tokens. A "
        "larger state, attention in the last blocks, or an auxiliary loss on an earlier block keep tokens apart"
    )

    def part(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        """The last ⌈`depth`·L⌉."""
        return blocks[len(blocks) - math.ceil(self.depth * len(blocks)) :]


@dataclass(frozen=True, kw_only=True)
class CollapseOnset(Signature):
    """Tokens become alike far faster than their similarity has been changing.

    **Rule.** What a state has gained is its `inter_token` less that of state 0, which takes away how repetitive the
    batch is; of state 0, `inter_token` itself. The value is that minus its median over the last 20 snapshots, once
    there are `min_history`. Its threshold is the larger of `threshold` and `noise` · 1.4826 · MAD, where MAD is the
    median absolute deviation from that median: 1.4826·MAD estimates a standard deviation, whatever single snapshots
    do. A steady rise widens the MAD and raises nothing; a level that has lasted ten snapshots is the new median, and
    releases it.

    **Source.** Our convention. In the models of `repflow demo` the value stays below .06 once there is a history.

    **How to read it.** Something happened at this step: a learning rate too high, a batch unlike the others, weights
    that a checkpoint or an update spoilt. Where only the data changed, the curve comes back.
    """

    name: str = "collapse_onset"
    severity: Severity = "warning"
    patience: int = 3
    warmup_steps: int = 200
    threshold: float = 0.15
    release: float = 0.10
    noise: float = 6.0
    """How many standard deviations, estimated from the MAD, a rise must exceed."""
    min_history: int = 8
    """Snapshots before the first judgement, 20 at most. Unit: snapshots."""

    title: ClassVar[str] = "Tokens are collapsing onto each other"
    reading: ClassVar[str] = "rise of inter-token similarity gained since state 0, above its recent median"
    suggestion: ClassVar[str] = (
        "Look at the loss and at what happened at this step (learning rate, data, a resumed checkpoint); if the loss "
        "rose too, go back to a checkpoint from before it with a lower learning rate"
    )
    history: ClassVar[int] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("min_history", 1 <= self.min_history <= self.history, f"from 1 to {self.history}")

    def read(self, snapshot: Snapshot, blocks: Sequence[BlockInfo], past: Float64[Tensor, "N S"]) -> Reading | None:
        """See `Signature.read`."""
        first, others = snapshot.inter_token.split([1, len(snapshot.inter_token) - 1])
        gained = torch.cat([first, others - first])
        if len(past) < self.min_history:
            return Reading(values=torch.full_like(gained, torch.nan), remember=gained)
        median, spread = usual(past)
        limit = (self.noise * spread).clamp(min=self.threshold)
        return Reading(values=gained - median, threshold=limit, remember=gained)
