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


def assert_similarity_gradient(
    got: tuple[Tensor, ...], want: tuple[Tensor, ...], state: Tensor, mask: object, **options: object
) -> None:
    """The similarity as METRICS.md asks of cosines; the gradient to 2e-6 of what could cancel in it, and its rounding.

    s and (u·s)u, each as long as the group has tokens, cancel where tokens are equal: of n of them 2/(n‖h‖) could.
    """
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=2e-6, equal_nan=True)
    assert got[0].dtype == want[0].dtype and got[0].shape == want[0].shape
    weight = float(options.get("weight", 1.0))  # pyright: ignore[reportArgumentType]
    length = torch.linalg.vector_norm(state.double(), dim=-1, keepdim=True)
    size = 2 * weight / torch.where(length.isfinite() & (length > 0), length, torch.inf)
    one, other = got[0].double(), want[0].double()
    assert torch.equal(one.isfinite(), other.isfinite())
    rounding = torch.finfo(state.dtype).eps * other.abs() + torch.finfo(state.dtype).tiny
    excess = (one - other).abs() - 2e-6 * size - rounding
    assert not bool((excess > 0).any()), excess.nan_to_num(0.0).max()
    for index in (2, 3):
        if 1e-30 < float(want[index]) < 1e30:  # they are squares in float32
            torch.testing.assert_close(got[index], want[index], rtol=1e-4, atol=1e-11 * float(size.square().sum()))
