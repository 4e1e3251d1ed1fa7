"""Live Δ and Ā of state-space blocks: which module's output tells them, and their counts over a forward.

What is known about mixers is data here, told by the names of their parameters and parts. Nothing of a model is switched
to another path to read it: where a fused kernel computes Δ without calling a module, there is nothing to read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import linear, softplus

from repflow.monitor.capture import CapturedForward, Recording
from repflow.monitor.functional.ssm import RATE_BINS, count_rates
from repflow.monitor.positions import token_positions, without_first
from repflow.monitor.residual_stream import ResidualStream
from repflow.monitor.sampling import Selection, send_index

_HELD_RATES, _HELD_BLOCKS = 2**24, 64
"""So many rates are held and then counted together, of so many blocks: a launch for each block would cost more, but a
large Mamba has 5000 channels for each of its tokens."""


@dataclass(frozen=True)
class DeltaReader:
    """How to read Δ_t in mixers of one kind."""

    needs: tuple[str, ...]
    """Names of the parameters and parts that tell a mixer of this kind."""
    source: Callable[[Any], Module]
    """From the mixer to the part whose output is read."""
    columns: Callable[[Any], slice]
    """The features of that output that tell Δ."""
    delta: Callable[[Any, Tensor], Tensor]
    """From the mixer and those features `[N, features]` to Δ in float32, `[N, H]` of H channels or heads."""


def _low_rank_delta(mixer: Any, features: Tensor) -> Float32[Tensor, "N H"]:
    """Δ = softplus(features @ dt_projᵀ + bias). The product is made in the dtype in which the mixer makes it."""
    projection, bias = mixer.dt_proj, getattr(mixer.dt_proj, "bias", None)
    raw = linear(features, projection.weight).float()
    return softplus(raw if bias is None else raw + bias.float())


def _delta_per_head(mixer: Any, features: Tensor) -> Float32[Tensor, "N H"]:
    """Δ = clamp(softplus(features·multiplier + dt_bias), limits). FalconH1 alone has a multiplier."""
    raw, heads = features.float(), features.shape[-1]
    if (multiplier := getattr(mixer, "mup_vector", None)) is not None:
        raw = raw * multiplier.flatten()[-heads:].float()
    low, high = getattr(mixer, "time_step_limit", getattr(mixer, "dt_limit", (0.0, float("inf"))))
    return softplus(raw + mixer.dt_bias.float()).clamp(low, high)


READERS: tuple[DeltaReader, ...] = (
    DeltaReader(  # Mamba, and FalconMamba and Jamba, which put a norm between x_proj and dt_proj
        needs=("A_log", "x_proj", "dt_proj"),
        source=lambda mixer: getattr(mixer, "dt_layernorm", mixer.x_proj),
        columns=lambda mixer: slice(0, mixer.dt_proj.weight.shape[1]),
        delta=_low_rank_delta,
    ),
    DeltaReader(  # Mamba-2, in all its hybrids
        needs=("A_log", "dt_bias", "in_proj"),
        source=lambda mixer: mixer.in_proj,
        columns=lambda mixer: slice(-mixer.dt_bias.numel(), None),
        delta=_delta_per_head,
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


def decay_rates(mixer: SsmMixer, features: Float[Tensor, "N features"]) -> Float32[Tensor, "N H"]:
    """r_{t,d} = Δ_{t,d}·min_n e^{A_log[d,n]}, the rate of the slowest mode of every channel or head. Unit: 1/token."""
    a_log = mixer.module.A_log.float()
    slowest = a_log.amin(-1) if a_log.ndim > 1 else a_log  # Mamba-1 has N modes in a channel, Mamba-2 one in a head
    return mixer.reader.delta(mixer.module, features) * slowest.exp()


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
    _rows: list[int] = field(default_factory=list)
    _rates: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, forward: Recording, blocks: int, skip_first: int, part: Selection) -> "DecayCounts":
        """Nothing counted yet. `part` is counted of what is captured."""
        device = forward.view.device
        decay, memory = torch.zeros(2, blocks, RATE_BINS, dtype=torch.float64, device=device)
        index, valid = _tokens(forward, skip_first, part)
        return cls(forward, index, valid, decay, memory, torch.zeros_like(decay[:, 0]))

    def add(self, row: int, mixer: SsmMixer, output: Tensor) -> None:
        """Take the rates out of what the mixer's source returned, while the mixer's parameters are there."""
        rows, tokens, _ = self.forward.shape
        if output.numel() != rows * tokens * output.shape[-1]:
            raise ValueError(f"expected an output for {rows} × {tokens} tokens, got shape {list(output.shape)}")
        features = output.detach()[..., mixer.reader.columns(mixer.module)].reshape(rows * tokens, -1)
        if self.index is not None:
            features = features.index_select(0, self.index.to(output.device, non_blocking=True))
        step = max(1, _HELD_RATES // mixer.module.A_log.shape[0])
        if len(features) > step:  # too many to be held
            for start in range(0, len(features), step):
                part = slice(start, start + step)
                rates = decay_rates(mixer, features[part])
                self._count([row], rates.unsqueeze(0), None if self.valid is None else self.valid[part])
            return
        rates = decay_rates(mixer, features)
        if self._rates and (
            rates.shape != self._rates[0].shape
            or len(self._rates) == _HELD_BLOCKS
            or (len(self._rates) + 1) * rates.numel() > _HELD_RATES
        ):
            self.count()
        self._rows.append(row)
        self._rates.append(rates.to(self.decay.device, non_blocking=True))

    def count(self) -> None:
        """Count the rates that are held."""
        if self._rates:
            rates = torch.stack(self._rates) if len(self._rates) > 1 else self._rates[0].unsqueeze(0)
            self._count(self._rows, rates, self.valid)
            self._rows, self._rates = [], []

    def _count(self, rows: list[int], rates: Float32[Tensor, "M N H"], valid: Bool[Tensor, " N"] | None) -> None:
        device = self.decay.device
        row = send_index(torch.tensor(rows, device="cpu"), device)
        counts = count_rates(rates.to(device, non_blocking=True), valid)
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
