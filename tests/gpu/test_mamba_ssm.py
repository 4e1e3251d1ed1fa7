"""mamba_ssm as it was built, on a GPU: docs/mamba_ssm.md says how. Left out where it is not installed."""

from typing import Any

import pytest
import torch

from tests import mamba_models as mamba

pytest.importorskip("mamba_ssm")
DEVICE = "cuda"
CHOICES = {
    "fused": dict(fused_add_norm=True, rms_norm=True),
    "unfused": dict(fused_add_norm=False, rms_norm=True),
    "LayerNorm": dict(fused_add_norm=True, rms_norm=False),
    "narrow residual": dict(fused_add_norm=True, rms_norm=True, residual_in_fp32=False),
}


@pytest.fixture(autouse=True)
def as_built() -> None:
    """Its kernels have no deterministic form, and PyTorch would fill their outputs."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", mamba.MODELS)
def test_states_kinds_and_losses(name: str, choice: str, dtype: torch.dtype) -> None:
    """States are the sums that hooks of one's own make, bit for bit, and the head makes the logits of the last one.

    The first loss is that of a run without the monitor, bit for bit. Later ones may differ as two runs without it do:
    backward adds up atomically.
    """
    options: dict[str, Any] = {**CHOICES[choice], "dtype": dtype}
    bare = mamba.train(mamba.make(name, device=DEVICE, **options))
    model: Any = mamba.make(name, device=DEVICE, **options)
    ids = torch.randint(mamba.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = mamba.own_states(model, ids)
    atol = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(mamba.logits_from(model, expected[-1]), model(ids).logits, atol=atol, rtol=0)
    monitor, seen = mamba.watch(model)
    assert ["+".join(block.parts) for block in monitor.stream.blocks] == mamba.expected_parts(name)
    losses = mamba.train(model, monitor)
    monitor.flush()
    assert monitor.enabled and monitor.latest is not None and monitor.latest.tokens == 2 * 16
    assert all(torch.equal(ours, own.to(ours.dtype)) for ours, own in zip(seen[0], expected, strict=True))
    assert losses[0] == bare[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(bare), atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", mamba.MODELS)
def test_fused_and_unfused_have_the_same_states(name: str) -> None:
    """Up to rounding: both are the same model."""
    ids = torch.randint(mamba.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    states = []
    for fused in (True, False):
        model = mamba.make(name, device=DEVICE, fused_add_norm=fused, rms_norm=True)
        monitor, seen = mamba.watch(model)
        with monitor.step(0):
            mamba.loss_of(model, ids).backward()
        states.append(seen[0])
    torch.testing.assert_close(states[0], states[1], atol=1e-4, rtol=1e-3)
