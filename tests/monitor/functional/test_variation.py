"""Eq. 3 and 4 against loops over tokens, states and features, and their laws."""

import numpy as np
import pytest
import torch

from repflow.monitor.functional import layer_global_variance, layer_local_variance

# METRICS: V_loc and V_glob agree with float64 to 1e-5 relative, for bfloat16 inputs too, since upcasting is exact.
RELATIVE = 1e-5


def mean(values: np.ndarray) -> float:
    """Over the (token, state) pairs that count; NaN if none does."""
    kept = values[~np.isnan(values)]
    return float(kept.sum() / kept.size) if kept.size else np.nan


def test_agree_with_the_definitions(case, oracle):
    states, mask = case.states, case.mask
    h, groups = oracle.upcast(states), oracle.token_groups(states, mask)
    local, spread = layer_local_variance(states, mask), layer_global_variance(states, mask)
    assert (local.dtype, local.ndim, spread.dtype, spread.ndim) == (torch.float64, 0, torch.float64, 0)
    # The absolute part is the rounding of float64 itself, for states that do not change at all.
    rounding = 1e-15 * np.abs(h[np.isfinite(h)]).max(initial=0.0)
    assert local.item() == pytest.approx(mean(oracle.curvature(h, groups)), rel=RELATIVE, abs=rounding, nan_ok=True)
    assert spread.item() == pytest.approx(mean(oracle.spread(h, groups)), rel=RELATIVE, abs=rounding, nan_ok=True)


def test_hand_worked_values():
    """One token: features 0, 1, 4, 9 and 2, 2, 2, 6."""
    states = torch.tensor([[0.0, 2.0], [1.0, 2.0], [4.0, 2.0], [9.0, 6.0]]).view(4, 1, 1, 2)
    assert layer_local_variance(states).item() == pytest.approx((1 + 1 + 0 + 2) / 4)
    assert layer_global_variance(states).item() == pytest.approx((12.25**0.5 + 3**0.5) / 2)


def test_equal_steps_do_not_bend():
    start, step = torch.randn(2, 1, 2, 4, 3, dtype=torch.float64)
    states = torch.cat([start + layer * step for layer in range(5)])
    assert layer_local_variance(states).item() == pytest.approx(0, abs=1e-14)
    # The population std of 0 … 4 is √2.
    assert layer_global_variance(states).item() == pytest.approx(2**0.5 * step.abs().mean().item(), rel=1e-12)


def test_equal_states_do_not_vary():
    states = torch.randn(1, 2, 4, 3).expand(6, 2, 4, 3)
    assert layer_local_variance(states).item() == 0
    assert layer_global_variance(states).item() == 0


@pytest.mark.parametrize("variance", [layer_local_variance, layer_global_variance])
def test_both_grow_with_the_states_and_not_with_a_shift(variance):
    states = torch.randn(4, 2, 5, 3, dtype=torch.float64)
    want = variance(states).item()
    assert variance(-8 * states).item() == pytest.approx(8 * want, rel=1e-12)
    assert variance(states + torch.randn(2, 5, 3, dtype=torch.float64)).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("variance", [layer_local_variance, layer_global_variance])
def test_order_and_padding_of_tokens_do_not_matter(variance):
    states = torch.randn(4, 2, 6, 3, dtype=torch.float64)
    want = variance(states).item()
    assert variance(states[:, :, torch.randperm(6)]).item() == pytest.approx(want, rel=1e-12)
    padded = torch.full((4, 3, 9, 3), 50.0, dtype=torch.float64)
    padded[:, :2, 1:7] = states
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:2, 1:7] = True
    assert variance(padded, mask).item() == pytest.approx(want, rel=1e-12)


def test_a_nonfinite_state_costs_the_triples_that_touch_it():
    """Token 0 keeps the triples (3, 4, 5) alone; its spread is lost. Token 1 keeps everything."""
    states = torch.randn(6, 1, 2, 3, dtype=torch.float64)
    states[2, 0, 0, 1] = torch.nan
    triples = [(3, 0), *((layer, 1) for layer in range(4))]
    bends = [states[a + 1, 0, t] - (states[a, 0, t] + states[a + 2, 0, t]) / 2 for a, t in triples]
    assert layer_local_variance(states).item() == pytest.approx(torch.stack(bends).abs().mean().item(), rel=1e-12)
    whole_token = layer_global_variance(states[:, :, 1:]).item()
    assert layer_global_variance(states).item() == pytest.approx(whole_token, rel=1e-12)


def test_nothing_to_measure_is_nan():
    states = torch.randn(2, 1, 4, 3)
    assert layer_local_variance(states).isnan()
    assert layer_global_variance(states).isfinite()
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert layer_global_variance(states, nothing).isnan()
    assert layer_local_variance(torch.randn(3, 1, 4, 3), nothing).isnan()
