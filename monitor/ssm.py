"""Live Δ and Ā of state-space blocks: which module's output tells them, and their counts over a forward.

What is known about mixers is data here, told by the names of their parameters and parts. Nothing of a model is switched
to another path to read it: where a fused kernel computes Δ without calling a module, there is nothing to read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import linear, softplus

from repflow.monitor.captured import CapturedForward, Recording
from repflow.monitor.functional.ssm import RATE_BINS, count_rates
from repflow.monitor.positions import token_positions, without_first
from repflow.monitor.residual_stream import ResidualStream
from repflow.monitor.sampling import Selection, send_index

_HELD_RATES, _HELD_BLOCKS = 2**24, 64
"""So many rates are held and then counted together, of so many blocks: a launch for each block would cost more, but a
large Mamba has 5000 channels for each of its tokens."""


@dataclass(frozen=True)
class DeltaReader:
    """How to read Δ_t = clamp(softplus(raw_t + bias), limits) in mixers of one kind, of H channels or heads."""

    needs: tuple[str, ...]
    """Names of the parameters and parts that tell a mixer of this kind."""
    source: Callable[[Any], Module]
    """From the mixer to the part whose output is read."""
    columns: Callable[[Any], slice]
    """The features of that output that tell Δ."""
    raw: Callable[[Any, Tensor], Tensor]
    """From the mixer and those features `[N, features]` to raw, `[N, H]`."""
    bias: Callable[[Any], Tensor | None]
    """`[H]`, or None if there is none."""
    limits: Callable[[Any], tuple[float, float]] = lambda mixer: (0.0, inf)


def _scaled(mixer: Any, features: Tensor) -> Tensor:
    """The step before its bias. FalconH1 alone has a multiplier."""
    if (multiplier := getattr(mixer, "mup_vector", None)) is None:
        return features
    return features.float() * multiplier.flatten()[-features.shape[-1] :].float()


READERS: tuple[DeltaReader, ...] = (
    DeltaReader(  # Mamba, and FalconMamba and Jamba, which put a norm between x_proj and dt_proj
        needs=("A_log", "x_proj", "dt_proj"),
        source=lambda mixer: getattr(mixer, "dt_layernorm", mixer.x_proj),
        columns=lambda mixer: slice(0, mixer.dt_proj.weight.shape[1]),
        raw=lambda mixer, features: linear(features, mixer.dt_proj.weight),  # in the dtype in which the mixer makes it
        bias=lambda mixer: getattr(mixer.dt_proj, "bias", None),
    ),
    DeltaReader(  # Mamba-2, in all its hybrids
        needs=("A_log", "dt_bias", "in_proj"),
        source=lambda mixer: mixer.in_proj,
        columns=lambda mixer: slice(-mixer.dt_bias.numel(), None),
        raw=_scaled,
        bias=lambda mixer: mixer.dt_bias,
        limits=lambda mixer: getattr(mixer, "time_step_limit", getattr(mixer, "dt_limit", (0.0, inf))),
    ),
)
"""Kinds of state-space mixers, of transformers and of mamba_ssm: the first that a mixer has all names of is used."""


@dataclass(frozen=True)
class SsmMixer:
    """A state-space mixer of a block."""

    block: int
    """Index of the block."""
    module: Any = field(repr=False)
    """The mixer, whose parts and parameters the names of its reader tell."""
    reader: DeltaReader = field(repr=False)


def ssm_mixers(stream: ResidualStream) -> Iterator[SsmMixer]:
    """The mixers of a stream's blocks whose Δ may be read."""
    for block in stream.blocks:
        for module in block.module.modules():
            reader = next((reader for reader in READERS if all(hasattr(module, name) for name in reader.needs)), None)
            if reader is not None:
                yield SsmMixer(block.index, module, reader)


def ssm_blocks(stream: ResidualStream) -> tuple[int, ...]:
    """Indices of the blocks with a state-space mixer, whether or not it can be read."""
    readable = {mixer.block for mixer in ssm_mixers(stream)}
    return tuple(block.index for block in stream.blocks if block.index in readable or "ssm" in block.parts)


@dataclass(frozen=True)
class HeldRates:
    """What the decay rates of a block follow from, copied while the mixer's parameters are there."""

    row: int
    """Of the block, in the counts."""
    raw: Float[Tensor, "N H"]
    constants: Float[Tensor, "2 H"]
    """The bias of Δ, and A_log of the slowest mode of every channel or head."""
    limits: tuple[float, float]
    """Of Δ."""

    @classmethod
    def of(cls, row: int, mixer: SsmMixer, features: Float[Tensor, "N features"]) -> "HeldRates":
        """Of these features. Few and small operations: they run in every block, and a GPU's host may be behind."""
        module, reader = mixer.module, mixer.reader
        slowest = module.A_log  # Mamba-1 has N modes in a channel, Mamba-2 one in a head
        if slowest.ndim > 1:
            slowest = slowest.amin(-1)
        bias = reader.bias(module)
        constants = torch.stack((torch.zeros_like(slowest) if bias is None else bias, slowest))
        low, high = reader.limits(module)
        return cls(row, reader.raw(module, features), constants, (float(low), float(high)))

    def to(self, device: torch.device) -> "HeldRates":
        """The same on `device`: blocks may stand on several."""
        raw, constants = (values.to(device, non_blocking=True) for values in (self.raw, self.constants))
        return replace(self, raw=raw, constants=constants)

    def goes_with(self, other: "HeldRates") -> bool:
        """Whether both can be counted together."""
        return self.raw.shape == other.raw.shape and self.limits == other.limits


def decay_rates(held: Sequence[HeldRates]) -> Float32[Tensor, "M N H"]:
    """r_{t,d} = Δ_{t,d}·min_n e^{A_log[d,n]}, the rate of the slowest mode of every channel or head. Unit: 1/token."""
    raw = torch.stack([one.raw for one in held]).float()
    bias, slowest = torch.stack([one.constants for one in held]).float().unsqueeze(2).unbind(1)
    return softplus(raw + bias).clamp(*held[0].limits) * slowest.exp()


@dataclass(eq=False)
class DecayCounts:
    """The counts of one forward, by state-space block; see `count_rates`."""

    forward: Recording
    index: Int64[Tensor, " N"] | None
    """The tokens that are counted, in the flattened micro-batch; None, all of them."""
    valid: Bool[Tensor, " N"] | None
    decay: Float[Tensor, "M bins"]
    memory: Float[Tensor, "M bins"]
    nonfinite: Float[Tensor, " M"]
    _held: list[HeldRates] = field(default_factory=list)

    @classmethod
    def of(cls, forward: Recording, blocks: int, skip_first: int, part: Selection) -> "DecayCounts":
        """Nothing counted yet. `part` is counted of what is captured."""
        device = forward.view.device
        decay, memory = torch.zeros(2, blocks, RATE_BINS, dtype=torch.float64, device=device)
        index, valid = _tokens(forward, skip_first, part)
        return cls(forward, index, valid, decay, memory, torch.zeros_like(decay[:, 0]))

    def add(self, row: int, mixer: SsmMixer, output: Tensor) -> None:
        """Take what the rates follow from out of what the mixer's source returned."""
        rows, tokens, _ = self.forward.shape
        if output.numel() != rows * tokens * output.shape[-1]:
            raise ValueError(f"expected an output for {rows} × {tokens} tokens, got shape {list(output.shape)}")
        features = output.detach()[..., mixer.reader.columns(mixer.module)].reshape(rows * tokens, -1)
        if self.index is None:
            features = features.clone()  # it is held, and the output is the model's
        else:
            features = features.index_select(0, self.index.to(output.device, non_blocking=True))
        step = max(1, _HELD_RATES // mixer.module.A_log.shape[0])
        if len(features) > step:  # too many to be held
            for start in range(0, len(features), step):
                part = slice(start, start + step)
                held = HeldRates.of(row, mixer, features[part])
                self._count([held], None if self.valid is None else self.valid[part])
            return
        held = HeldRates.of(row, mixer, features)
        if self._held and (
            not held.goes_with(self._held[0])
            or len(self._held) == _HELD_BLOCKS
            or (len(self._held) + 1) * held.raw.numel() > _HELD_RATES
        ):
            self.count()
        self._held.append(held)

    def count(self) -> None:
        """Count the rates that are held."""
        if self._held:
            self._count(self._held, self.valid)
            self._held = []

    def _count(self, held: Sequence[HeldRates], valid: Bool[Tensor, " N"] | None) -> None:
        device = self.decay.device
        row = send_index(torch.tensor([one.row for one in held], device="cpu"), device)
        counts = count_rates(decay_rates([one.to(device) for one in held]), valid)
        for total, count in zip((self.decay, self.memory, self.nonfinite), counts, strict=True):
            total.index_add_(0, row, count.double())


class DecayTaps:
    """Counts the decay rates of every recorded forward, in hooks that live as long as those of the states.

    Args:
        stream: whose state-space blocks are read.
        skip_first: tokens left out at the start of every sequence.
        failed: called with an exception; nothing is read afterwards.
        choose: from (R, K) of what is captured to what is counted of it.
    """

    def __init__(
        self,
        stream: ResidualStream,
        skip_first: int,
        failed: Callable[[Exception], None],
        choose: Callable[[tuple[int, int]], Selection],
    ) -> None:
        self._rows = {index: row for row, index in enumerate(ssm_blocks(stream))}
        self._mixers = tuple(ssm_mixers(stream))
        self._skip_first, self._failed, self._choose = skip_first, failed, choose
        self._counts: DecayCounts | None = None

    def hooks(self) -> list[tuple[Module, Callable[[Recording, Callable[[], Tensor]], None]]]:
        """The modules to hook, and what to call with the forward under way and how to read the module's output."""
        owners: dict[Module, dict[int, SsmMixer]] = {}  # by block: a mixer may be shared
        for mixer in self._mixers:
            owners.setdefault(mixer.reader.source(mixer.module), {})[mixer.block] = mixer
        return [(source, partial(self._read, mixers)) for source, mixers in owners.items()]

    def forget(self) -> None:
        """Drop what was read of a forward that did not end: it holds on to the buffer."""
        self._counts = None

    def take(self, forward: CapturedForward) -> DecayCounts | None:
        """The counts of a forward that has ended; None if nothing of it was read."""
        counts, self._counts = self._counts, None
        if counts is None or counts.forward.view is not forward.states:
            return None
        try:
            counts.count()
        except Exception as error:
            self._fail(error)
            return None
        return counts

    @torch.no_grad()
    def _read(self, mixers: dict[int, SsmMixer], forward: Recording, read: Callable[[], Tensor]) -> None:
        mixer = mixers.get(forward.filled - 1)
        if mixer is None or not self._mixers:
            return
        try:
            output = read()
            if self._counts is None or self._counts.forward is not forward:
                part = self._choose(forward.selection(forward.view.device).shape)
                self._counts = DecayCounts.of(forward, len(self._rows), self._skip_first, part)
            self._counts.add(self._rows[mixer.block], mixer, output)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._mixers, self._counts = (), None
        self._failed(error)


def _tokens(
    forward: Recording, skip_first: int, part: Selection
) -> tuple[Int64[Tensor, " N"] | None, Bool[Tensor, " N"] | None]:
    """`index` and `valid` of `DecayCounts`."""
    rows, tokens, _ = forward.shape
    device = forward.view.device
    selection, part = forward.selection(device), part.to(device)

    def take(values: Tensor) -> Tensor:
        return part.take(selection.take(values)).flatten()

    index = None
    if part.shape != (rows, tokens):
        index = take(torch.arange(rows * tokens, device=device).view(rows, tokens))
    mask = forward.mask
    if mask is None and not skip_first:
        return index, None
    if mask is None:
        mask = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    mask = mask.to(device, non_blocking=True)
    if mask.is_floating_point():
        mask = mask > 0  # given with the step
    if skip_first:
        mask = without_first(mask, token_positions(mask), skip_first)
        assert mask is not None
    return index, take(mask) > 0
