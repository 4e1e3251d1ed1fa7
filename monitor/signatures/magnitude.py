"""Signatures of size: norms that explode, tokens that dwarf the others, values that are no numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from repflow.monitor.alert import Severity
from repflow.monitor.signatures._base import Reading, Signature, usual
from repflow.monitor.snapshot import BlockInfo, Snapshot
from repflow.monitor.sum_layout import SumLayout


@dataclass(frozen=True, kw_only=True)
class NonFinite(Signature):
    """Tokens have a NaN or an infinity.

    **Rule.** The value of a state is `nonfinite`, the number of its valid tokens with a value that is not finite; one
    is enough, at any step. The first state named is the first in depth: what it holds comes out of the block before
    it.

    **Source.** None is needed.

    **How to read it.** In the snapshot where it begins, the first state tells the layer. After an update by a
    gradient with NaN all weights have it, and all states do: then the layer is lost, and `every_n_steps` was too
    coarse.
    """

    name: str = "nonfinite"
    severity: Severity = "error"
    patience: int = 1
    warmup_steps: int = 0
    threshold: float = 0.0
    release: float = 0.0

    title: ClassVar[str] = "Values are not finite"
    reading: ClassVar[str] = "number of tokens with NaN or infinity"
    suggestion: ClassVar[str] = (
        "Go back to a checkpoint from before this step. Look for an overflow in the block named first (float16 ends at "
        "65504; bfloat16 does not), a division by zero, a logarithm or a mask of -inf over a whole row; clip gradients"
    )

    def read(self, snapshot: Snapshot, blocks: Sequence[BlockInfo], past: Float64[Tensor, "N S"]) -> Reading | None:
        """See `Signature.read`."""
        return Reading(values=snapshot.nonfinite.double())

    def remark(self, states: Sequence[int]) -> str:
        """That the layer may be lost."""
        if 0 not in states:
            return ""
        return "what enters block 0 has them already, so that they came from the embedding, or an update spread them"

    def show(self, value: float) -> str:
        """A count."""
        return f"{value:.0f}"


@dataclass(frozen=True, kw_only=True)
class NormExplosion(Signature):
    """The norm of the states is several times what it has been.

    **Rule.** The value of a state is `norms` divided by its median over the last 20 snapshots, once there are
    `min_history`. Its threshold is the larger of `threshold` and exp(`noise` · 1.4826 · MAD), where MAD is the median
    absolute deviation of the logarithms: while norms grow by a factor per snapshot, as they do in the first steps,
    the MAD is wide and nothing is raised.

    **Source.** Our convention. In the transformer of `repflow demo`, whose norms grow 50-fold, the value reaches 7 in
    the first 40 steps, where the MAD is wide, and stays below 3 after that.

    **How to read it.** The first state named comes out of the block where it begins; the residual stream carries it
    on to all that follow. The loss often shows it later.
    """

    name: str = "norm_explosion"
    severity: Severity = "error"
    patience: int = 2
    warmup_steps: int = 0
    threshold: float = 5.0
    release: float = 2.0
    noise: float = 6.0
    """How many standard deviations of the logarithm, estimated from the MAD, a rise must exceed."""
    min_history: int = 5
    """Snapshots before the first judgement, 20 at most. Unit: snapshots."""

    title: ClassVar[str] = "Norms explode"
    reading: ClassVar[str] = "norm as a multiple of its recent median"
    suggestion: ClassVar[str] = (
        "Lower the learning rate or clip gradients, and look at the weights of the block named first; go back to a "
        "checkpoint from before it if the loss has risen"
    )
    history: ClassVar[int] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("min_history", 1 <= self.min_history <= self.history, f"from 1 to {self.history}")

    def read(self, snapshot: Snapshot, blocks: Sequence[BlockInfo], past: Float64[Tensor, "N S"]) -> Reading | None:
        """See `Signature.read`."""
        logarithm = snapshot.norms.log()
        logarithm = logarithm.masked_fill(logarithm.isinf(), torch.nan)  # of states that are zero, as some begin
        if len(past) < self.min_history:
            return Reading(values=torch.full_like(logarithm, torch.nan), remember=logarithm)
        median, spread = usual(past)
        limit = (self.noise * spread).exp().clamp(min=self.threshold)
        return Reading(values=(logarithm - median).exp(), threshold=limit, remember=logarithm)


@dataclass(frozen=True, kw_only=True)
class MassiveActivations(Signature):
    """One token is many times larger than the others.

    **Rule.** The value of a state is max_t ‖x_t‖ / mean_t ‖h_t‖: the largest norm of a token, features centred over
    its sequence, relative to `norms`. Tokens are those that enter CKA; without the metric `cka` nothing is judged. It
    cannot exceed the number of tokens measured, so that very short sequences hide it.

    **Source.** Sun et al. (2024, arXiv 2402.17762) call an activation massive from 1000 times the median magnitude
    on. One feature of that size makes a token's norm 10 to 13 times that of the others with 4096 to 2560 normally
    distributed features, hence 10. In the models of `repflow demo` the value stays below 3.

    **How to read it.** Usually the first token, or a delimiter, that attention uses as a sink. That is no fault of
    its own, but means over tokens are then means with an outlier, low precision loses the others' digits, and CKA
    shows that token alone (see `dominant_token`).
    """

    name: str = "massive_activations"
    severity: Severity = "warning"
    patience: int = 3
    warmup_steps: int = 0
    threshold: float = 10.0
    release: float = 8.0

    title: ClassVar[str] = "Massive activations: one token dwarfs the others"
    reading: ClassVar[str] = "norm of the largest token as a multiple of the mean norm"
    suggestion: ClassVar[str] = (
        "If it is the first token of each sequence, set skip_first_tokens=1 to measure the others; if it appears in "
        "training, watch it in low precision and before quantisation. Norms on queries and keys, or a learned sink, "
        "avoid it"
    )

    def read(self, snapshot: Snapshot, blocks: Sequence[BlockInfo], past: Float64[Tensor, "N S"]) -> Reading | None:
        """See `Signature.read`."""
        largest = _sums(snapshot)["fourth_moment_max"] ** 0.25
        measured = _sums(snapshot)["fourth_moment"] > 0
        return Reading(values=torch.where(measured, largest / snapshot.norms, torch.nan))


@dataclass(frozen=True, kw_only=True)
class DominantToken(Signature):
    """One token of a sequence decides CKA.

    **Rule.** The value of a state is `hsic_top_token` · G, at most 1, with G the number of sequences in CKA: the
    largest share of one token in Σ‖x_c‖⁴ of an average sequence. (`hsic_top_token` alone is at most 1/G where every
    sequence has such a token.) HSIC grows with the fourth power of a token's norm, so that a token with half of the
    sum owns it.

    **Source.** Our convention: half. In the models of `repflow demo`, with 256 tokens to a sequence, the value is 1 at
    times in the first ten steps and below .06 after 15. With few tokens to a sequence any of them has a large share:
    with 32, up to .4 is usual. What it means: of two layers alike in 254 of 256 features, with one token of norm 1000
    on the other two, unbiased CKA is .054 and biased .9995; without that token they are .993 and .995.

    **How to read it.** CKA of these states is the similarity of one token, most often an attention sink. Curves of
    CKA, and `redundant_layers`, say nothing of the other tokens.
    """

    name: str = "dominant_token"
    severity: Severity = "info"
    patience: int = 3
    warmup_steps: int = 200
    threshold: float = 0.5
    release: float = 0.25

    title: ClassVar[str] = "One token decides CKA"
    reading: ClassVar[str] = "share of one token in the sum behind CKA"
    suggestion: ClassVar[str] = (
        "Set skip_first_tokens=1 (or as many as are sinks) to see the other tokens, and do not read CKA of these "
        "states until then"
    )

    def read(self, snapshot: Snapshot, blocks: Sequence[BlockInfo], past: Float64[Tensor, "N S"]) -> Reading | None:
        """See `Signature.read`."""
        return Reading(values=(snapshot.hsic_top_token * _sums(snapshot)["hsic_groups"]).clamp(max=1.0))


def _sums(snapshot: Snapshot) -> dict[str, Tensor]:
    """The sums behind the values, by name."""
    return SumLayout(len(snapshot.norms), snapshot.ssm_blocks, snapshot.probe).views(snapshot.sums)
