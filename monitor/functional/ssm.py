"""How fast state-space blocks forget: rates counted in bins, from which decay and memory length are read.

A state-space mixer turns its state S_t, of H channels or heads, into S_{t+1} = Ā_t S_t + …, Ā_t = exp(−Δ_t e^{A_log})
diagonal. The rate of channel d at token t is r_{t,d} = −ln ‖Ā_{t,d}‖₂ = Δ_{t,d}·min_n e^{A_log[d,n]} (Mamba-2 has one
A per head). Its decay is ρ_{t,d} = exp(−r_{t,d}), its memory length τ_{t,d} = −1/ln ρ_{t,d} = 1/r_{t,d}, in tokens.

Quantiles are no sums. Sums of counts are, over micro-batches, ranks and steps: rates are counted in `RATE_BINS` bins, 8
to an octave, from which every quantile follows within a factor of 9/8 in τ.
"""

from collections.abc import Mapping, Sequence
from math import inf

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles that are reported."""
SHORTEST, LONGEST = 2.0**-4, 2.0**16
"""Memory lengths outside of these count as these. Unit: tokens."""

_OCTAVES, _BINS_PER_OCTAVE = 20, 8
RATE_BINS = _OCTAVES * _BINS_PER_OCTAVE
"""Bins of the rate, from 1/LONGEST to 1/SHORTEST."""

# A positive float32 shifted right by 20 bits is its exponent followed by 3 bits of its mantissa: a bin of its own for
# every eighth of an octave, with edges that are exact on every device, and without a logarithm.
_SHIFT = 20
_FIRST = 111 * _BINS_PER_OCTAVE  # of 2⁻¹⁶, whose biased exponent is 127 − 16


def rate_edges() -> Float64[Tensor, " edges"]:
    """Edges of the bins, ascending. Bin b holds rates from edge b to below edge b + 1. Unit: 1/token."""
    bins = torch.arange(RATE_BINS + 1, device="cpu")
    octave = bins.div(_BINS_PER_OCTAVE, rounding_mode="floor").double()
    return (1 + bins % _BINS_PER_OCTAVE / _BINS_PER_OCTAVE) * torch.exp2(octave) / LONGEST


def count_rates(
    rates: Float32[Tensor, "*M N H"], valid: Bool[Tensor, " N"] | None = None
) -> tuple[Int[Tensor, "*M bins"], Int[Tensor, "*M bins"], Int[Tensor, "*M"]]:
    """Count the rates of N tokens in bins, for each of M blocks; waits for no GPU.

    Args:
        rates: r_{t,d} of every token and channel (or head), not negative.
        valid: the tokens that count; None, all of them.

    Returns:
        Tokens by the rate of their slowest channel, −ln ρ_t with ρ_t = ‖Ā_t‖₂ = max_d ρ_{t,d}; tokens × channels by
        r_{t,d}; valid tokens with a NaN or an infinity among their rates, which enter neither.
    """
    slowest, fastest = rates.aminmax(dim=-1)
    finite = fastest < inf  # false for NaN, too
    counted = finite if valid is None else finite & valid
    nonfinite = (~finite if valid is None else valid & ~finite).sum(-1)
    tokens = _count(torch.where(counted, _bins(slowest), 0))
    each = _count(torch.where(counted.unsqueeze(-1), _bins(rates), 0).flatten(-2))
    return tokens, each, nonfinite


def memory_quantiles(
    counts: Float[Tensor, "*batch bins"], levels: Sequence[float] = QUANTILES
) -> Float64[Tensor, "*batch Q"]:
    """Quantiles of the memory length τ = 1/r of what was counted; NaN where nothing was. Unit: tokens.

    The quantile at level p is the smallest τ that a share of at least p does not exceed (`inverted_cdf` in NumPy). Its
    bin is exact; within the bin τ is interpolated, so that it is off by less than a factor of 9/8, and lies between
    `SHORTEST` and `LONGEST`.
    """
    return _quantiles(counts, (1 / rate_edges()).flip(0), levels)


def decay_quantiles(
    counts: Float[Tensor, "*batch bins"], levels: Sequence[float] = QUANTILES
) -> Float64[Tensor, "*batch Q"]:
    """Quantiles of the decay ρ = exp(−r) of what was counted, defined as in `memory_quantiles`.

    −ln ρ is off by less than a factor of 9/8: ρ by less than 0.05, and the closer to 1 the less.
    """
    return _quantiles(counts, torch.exp(-rate_edges()).flip(0), levels)


def ssm_values(sums: Mapping[str, Tensor], blocks: Sequence[int], transitions: int) -> dict[str, Tensor]:
    """`ssm_decay`, `ssm_memory` and `ssm_nonfinite` of `Snapshot`, from the sums that `blocks` have a row in.

    Any number of batch dimensions may come first. Other blocks have NaN, and no token that is not finite.
    """
    values = {
        "ssm_decay": decay_quantiles(sums["ssm_decay_bins"]),
        "ssm_memory": memory_quantiles(sums["ssm_memory_bins"]),
        "ssm_nonfinite": sums["ssm_nonfinite"].long(),
    }
    dim, index = sums["ssm_nonfinite"].ndim - 1, torch.tensor(blocks, device="cpu")
    for name, rows in values.items():
        shape = (*rows.shape[:dim], transitions, *rows.shape[dim + 1 :])
        absent = torch.nan if rows.is_floating_point() else 0
        values[name] = rows.new_full(shape, absent).index_copy(dim, index, rows)
    return values


def _quantiles(
    counts: Float[Tensor, "*batch bins"], edges: Float64[Tensor, " edges"], levels: Sequence[float]
) -> Float64[Tensor, "*batch Q"]:
    """Quantiles of a quantity that falls with the rate, whose ascending `edges` are given.

    Nothing but sums, products and quotients are made of the counts: the same bits in any batch.
    """
    ascending = counts.double().flip(-1)
    reached = ascending.cumsum(-1)
    total = reached[..., -1:]
    target = total * torch.tensor(levels, dtype=torch.float64, device="cpu")
    index = torch.searchsorted(reached, target)
    inside = ascending.gather(-1, index)
    share = 1 - (reached.gather(-1, index) - target) / inside
    low, high = edges[index], edges[index + 1]
    return torch.where(total > 0, low + (high - low) * share, torch.nan)


def _bins(rates: Float32[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Numbers of the bins, from 1 on."""
    return (rates.view(torch.int32) >> _SHIFT).sub_(_FIRST - 1).clamp_(1, RATE_BINS)


def _count(bins: Int[Tensor, "*M n"]) -> Int[Tensor, "*M bins"]:
    """How often each bin occurs in a row; 0 is none."""
    width, rows = RATE_BINS + 1, bins.shape[:-1].numel()
    first = width * torch.arange(rows, dtype=bins.dtype, device=bins.device)
    place, size = (bins.view(rows, -1) + first.unsqueeze(1)).flatten(), rows * width
    if not bins.is_cuda:
        counts = torch.bincount(place, minlength=size)  # on a GPU it would wait for the largest
    elif torch.are_deterministic_algorithms_enabled():  # histc is refused then, although counts are exact
        counts = torch.searchsorted(place.sort().values, torch.arange(size + 1, device=bins.device)).diff()
    else:
        counts = torch.histc(place, size, 0, size)
    return counts.view(*bins.shape[:-1], width)[..., 1:]
