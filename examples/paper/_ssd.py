"""Mamba-2's scan as a few matrix products over chunks, for training where its fused kernels are not installed.

What transformers falls back on writes out a product for every pair of tokens of a chunk, head and state. The result is
the same; the weights, and so the checkpoints, are those of transformers.
"""

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad, silu, softplus

CHUNK = 64
"""Tokens within which all pairs are looked at."""


def train_by_products(model: Module) -> int:
    """Let all Mamba-2 mixers of a model compute by `scan`; their number. Padded rows are not for them."""
    mixers = [module for module in model.modules() if hasattr(module, "A_log") and hasattr(module, "dt_bias")]
    for mixer in mixers:
        mixer.forward = MethodType(_mix, mixer)
    return len(mixers)


def scan(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, chunk: int = CHUNK) -> Tensor:
    """y_t = C_t h_t, where h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ, from h = 0.

    Args:
        x: `[B, T, H, P]`.
        dt: Δ, `[B, T, H]`, float32.
        rate: A, `[H]`, below 0.
        b: `[B, T, N]`, shared by all heads.
        c: `[B, T, N]`.
        chunk: Q, tokens of a chunk.

    Returns:
        `[B, T, H, P]`.
    """
    tokens = x.shape[1]
    x, dt, b, c = (_chunks(values, chunk) for values in (x, dt, b, c))  # [B, K, Q, ...]
    decay = (dt * rate).cumsum(2).movedim(-1, 2)  # [B, K, H, Q]: log of what is left of the state before the chunk
    within = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(_later(chunk, x.device), -torch.inf).exp()
    weighted = (x * dt.unsqueeze(-1)).to(x.dtype).movedim(3, 2)  # [B, K, H, Q, P]
    pairs = (c @ b.mT).unsqueeze(2) * within.to(c.dtype)  # [B, K, H, Q, Q]
    inside = pairs @ weighted
    left = (decay[..., -1:] - decay).exp().unsqueeze(-1)  # of what a token adds, at the end of its chunk
    added = b.mT.unsqueeze(2) @ (weighted * left.to(x.dtype))  # [B, K, H, N, P]
    total = pad(decay[..., -1].cumsum(1), (0, 0, 1, 0))  # [B, K + 1, H]
    between = (total[:, :-1].unsqueeze(2) - total[:, 1:].unsqueeze(1)).movedim(-1, 1)  # [B, H, K, K]
    between = between.masked_fill(_later(between.shape[-1], x.device, 0), -torch.inf).exp()
    before = torch.einsum("bhij,bjhnp->bihnp", between.to(x.dtype), added)  # the state at the start of each chunk
    carried = (c.unsqueeze(2) @ before) * decay.exp().unsqueeze(-1).to(x.dtype)
    return (inside + carried).movedim(2, 3).flatten(1, 2)[:, :tokens]


def convolve(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each feature with its own few weights over the last tokens, as sums a compiler joins with what is around them.

    The convolution of a library wants tokens last, and is slow where each feature has weights of its own.

    Args:
        values: `[B, T, C]`.
        weight: `[C, 1, W]`, the last of the W weights for the token itself.
        bias: `[C]`.

    Returns:
        `[B, T, C]`.
    """
    tokens, width = values.shape[1], weight.shape[-1]
    padded = pad(values, (0, 0, width - 1, 0))
    terms = [padded[:, tap : tap + tokens] * weight[:, 0, tap] for tap in range(width)]
    total = functools.reduce(torch.add, terms if bias is None else [*terms, bias])
    return total.to(values.dtype)


def _chunks(values: Tensor, chunk: int) -> Tensor:
    missing = -values.shape[1] % chunk
    return pad(values, (0, 0) * (values.ndim - 2) + (0, missing)).unflatten(1, (-1, chunk))


def _later(size: int, device: torch.device, first: int = 1) -> Tensor:
    """True where the column comes after the row, or with `first=0` is the same."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(first)


def _mix(mixer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
    """A Mamba-2 mixer of transformers, of one group, without a cache."""
    assert mixer.n_groups == 1
    state = mixer.ssm_state_size
    gate, mixed, dt = mixer.in_proj(hidden_states).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1
    )
    mixed = silu(convolve(mixed, mixer.conv1d.weight, mixer.conv1d.bias))
    x, b, c = mixed.split([mixer.intermediate_size, state, state], dim=-1)
    dt = softplus(dt.float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
    x = x.unflatten(-1, (mixer.num_heads, mixer.head_dim))
    y = scan(x, dt, -mixer.A_log.float().exp(), b, c) + x * mixer.D.unsqueeze(-1).to(x.dtype)
    return mixer.out_proj(mixer.norm(y.flatten(2), gate))
