"""Mamba's selective scan in few large steps, where transformers would take one step for every token."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_SCAN = "mamba_selective_scan"
"""What the modules of transformers call, under a name of their own module."""


@contextmanager
def parallel_scan(model: nn.Module) -> Iterator[str | None]:
    """The model with its selective scans run by the fastest code that is here.

    mamba_ssm's kernels are left where transformers has found them. Without these it loops over the tokens of a sequence
    in Python, some 10⁵ steps for each forward of a model with 64 blocks; `chunked_scan` takes their place. Mamba-2's
    scan is in large steps by itself.

    Gives what runs: `mamba_ssm`, `chunked`, or `transformers` for its own code; None for a model that scans nothing.
    """
    defining = {module for module in map(_home, model.modules()) if hasattr(module, _SCAN)}
    if importlib.util.find_spec("mamba_ssm") is not None:
        defining.clear()
    kept = {module: getattr(module, _SCAN) for module in defining}
    for module in defining:
        setattr(module, _SCAN, chunked_scan)
    try:
        yield _told(model, bool(defining))
    finally:
        for module, scan in kept.items():
            setattr(module, _SCAN, scan)


def _home(module: nn.Module) -> ModuleType:
    return sys.modules[type(module).__module__]


def _told(model: nn.Module, chunked: bool) -> str | None:
    if not any(hasattr(module, "A_log") for module in model.modules()):
        return None
    if importlib.util.find_spec("mamba_ssm") is not None:
        return "mamba_ssm"
    return "chunked" if chunked else "transformers"


def chunked_scan(
    hidden_states: Float[Tensor, "B D T"],
    dt: Float[Tensor, "B D T"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B N T"],
    C: Float[Tensor, "B N T"],
    D: Float[Tensor, " D"] | None = None,
    z: Float[Tensor, "B D T"] | None = None,
    delta_bias: Float[Tensor, " D"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Float[Tensor, "B D T"] | tuple[Float[Tensor, "B D T"], Float[Tensor, "B D N"]]:
    """s_t = exp(Δ_t A) s_(t−1) + Δ_t B_t x_t, y_t = C_t s_t + D x_t, times SiLU(z): `selective_scan_fn` of mamba_ssm.

    The states are float32 whatever comes in, and so is what is returned. It is for inference: states are added up in
    place.
    """
    if delta_bias is not None:
        dt = dt + delta_bias.unsqueeze(-1)
    if delta_softplus:
        dt = nn.functional.softplus(dt)
    rate, inputs = dt.transpose(1, 2).float(), hidden_states.transpose(1, 2).float()
    decay = torch.exp(rate.unsqueeze(-1) * A)  # [B, T, D, N]
    states = (rate * inputs).unsqueeze(-1) * B.transpose(1, 2).float().unsqueeze(2)
    _scan_(decay, states)
    output = (states @ C.transpose(1, 2).float().unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    if D is not None:
        output = output + hidden_states * D.unsqueeze(-1)
    if z is not None:
        output = output * nn.functional.silu(z)
    return (output, states[:, -1]) if return_last_state else output


def _scan_(decay: Float[Tensor, "B T D N"], states: Float[Tensor, "B T D N"]) -> None:
    """states_t += decay_t · states_(t−1) for t = 1, 2, …, in about 2√T steps; `decay` is overwritten too.

    All chunks of √T tokens are scanned at once, each from 0, along with the products of their decays; what a chunk
    leaves is then carried into the next one. Decays are only ever multiplied, never divided by, so nothing overflows.
    """
    tokens = states.shape[1]
    chunk = isqrt(tokens)
    whole = tokens - tokens % chunk
    inner, products = (values[:, :whole].unflatten(1, (-1, chunk)) for values in (states, decay))
    for place in range(1, chunk):
        inner[:, :, place].addcmul_(products[:, :, place], inner[:, :, place - 1])
        products[:, :, place].mul_(products[:, :, place - 1])
    for number in range(1, whole // chunk):
        inner[:, number].addcmul_(products[:, number], inner[:, number - 1, -1:])
    for token in range(whole, tokens):
        states[:, token].addcmul_(decay[:, token], states[:, token - 1])
