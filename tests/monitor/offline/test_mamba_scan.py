"""Mamba's scan in chunks: the recurrence itself, and what transformers' own loop over tokens gives."""

import importlib.util

import pytest
import torch
import transformers
from torch import Tensor

from repflow.monitor.offline.mamba_scan import chunked_scan, parallel_scan
from tests.monitor.offline import tiny


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token in float64."""
    x, dt, A, B, C, D, z = (value.double() for value in (x, dt, A, B, C, D, z))
    state, outputs = torch.zeros(len(x), *A.shape, dtype=torch.float64), []
    for t in range(x.shape[-1]):
        rate = torch.nn.functional.softplus(dt[..., t])
        state = torch.exp(rate.unsqueeze(-1) * A) * state + (rate * x[..., t]).unsqueeze(-1) * B[:, None, :, t]
        y = (state * C[:, None, :, t]).sum(-1) + D * x[..., t]
        outputs.append(y * torch.nn.functional.silu(z[..., t]))
    return torch.stack(outputs, -1), state


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 63, 100])
def test_it_is_the_recurrence(tokens: int):
    shapes = [(2, 5, tokens), (2, 5, tokens), (5, 4), (2, 4, tokens), (2, 4, tokens), (5,), (2, 5, tokens)]
    x, dt, A, B, C, D, z = (torch.randn(shape) for shape in shapes)
    A = -A.exp() * 3  # some channels forget at once, where dividing by products of decays would overflow
    kept = [value.clone() for value in (x, dt, A, B, C, D, z)]
    found = chunked_scan(x, dt, A, B, C, D=D, z=z, delta_softplus=True, return_last_state=True)
    for value, expected in zip(found, recurrence(x, dt, A, B, C, D, z), strict=True):
        assert torch.allclose(value.double(), expected, atol=1e-5)
    assert all(map(torch.equal, (x, dt, A, B, C, D, z), kept))


def test_the_bias_of_rates():
    x, dt, B, C = torch.randn(1, 3, 9), torch.randn(1, 3, 9), torch.randn(1, 2, 9), torch.randn(1, 2, 9)
    A, bias = -torch.rand(3, 2), torch.randn(3)
    biased = chunked_scan(x, dt, A, B, C, delta_bias=bias, delta_softplus=True)
    expected = chunked_scan(x, dt + bias[:, None], A, B, C, delta_softplus=True)
    assert isinstance(biased, Tensor) and isinstance(expected, Tensor)
    assert torch.allclose(biased, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_gives_what_it_gives_without_it(dtype: torch.dtype):
    model = transformers.AutoModel.from_config(tiny.config("mamba"), dtype=dtype).eval()
    ids = torch.randint(0, tiny.VOCABULARY, (3, 70))
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state.float()
        with parallel_scan(model) as told:
            found = model(ids, attention_mask=mask).last_hidden_state.float()
        again = model(ids, attention_mask=mask).last_hidden_state.float()
    assert torch.allclose(found, expected, atol=2e-5 if dtype == torch.float32 else 5e-2)
    assert torch.equal(again, expected)  # its own code is back
    assert told == ("chunked" if importlib.util.find_spec("mamba_ssm") is None else "mamba_ssm")


def test_models_that_need_none():
    for kind, expected in {"gpt_neo": None, "mamba2": "transformers"}.items():
        with parallel_scan(transformers.AutoModel.from_config(tiny.config(kind))) as told:
            assert told in (expected, "mamba_ssm" if expected else None)
