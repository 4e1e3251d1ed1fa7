"""How near the Triton kernels, which add in float32, must come to the float64 of the reference."""

import torch
from torch import Tensor


def largest(states: Tensor) -> Tensor:
    """The largest finite magnitude of each token `[B, T]`: what float32 differences are rounded relative to."""
    return states.double().nan_to_num(0, 0, 0).abs().amax((0, -1))


def assert_depth(got: tuple[Tensor, ...], want: tuple[Tensor, ...], states: Tensor) -> None:
    """METRICS.md: cosines to 1e-5, distances to 1e-3 of themselves above 1e-5, variation to 1e-5 of itself."""
    rounding = 4e-7 * largest(states)
    tolerances = ((2e-6, 0.0), (0.0, 5e-6), (1e-3, 1e-8), (1e-5, rounding), (1e-5, rounding))
    for one, other, (relative, absolute) in zip(got[:5], want[:5], tolerances, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.equal(one.isnan(), other.isnan())
        excess = (one - other).abs() - relative * other.abs() - absolute
        assert not bool((excess > 0).any()), excess.nan_to_num(0.0).max()
    assert [entry.dtype for entry in got[5:]] == [torch.int64] * 2
    assert [entry.tolist() for entry in got[5:]] == [entry.tolist() for entry in want[5:]]


def assert_sums(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Components of unit vectors, as many as are counted, each rounded a few times."""
    for one, other, count in ((got[0], want[0], want[1]), (got[2], want[2], want[3])):
        assert one.shape == other.shape and one.dtype == torch.float64
        assert bool(((one - other).abs() <= 5e-7 * count.sqrt().unsqueeze(-1)).all()), (one - other).abs().max()
    for one, other in ((got[1], want[1]), (got[3], want[3])):
        assert one.dtype == torch.int64 and torch.equal(one, other)
