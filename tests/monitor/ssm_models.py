"""Tiny models with state-space blocks, and what their scans are given."""

import inspect
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import softplus

SMALL: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
MAMBA2 = dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16)
HYBRID = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16)
ZAMBA2: dict[str, Any] = dict(
    n_mamba_heads=8,
    mamba_d_state=8,
    mamba_ngroups=1,
    chunk_size=16,
    num_mem_blocks=1,
    use_shared_attention_adapter=False,
)
TYPES = ["mamba", "hybrid", "mamba", "hybrid"]
# Options, and the blocks with a state-space mixer.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Mamba": (dict(state_size=4), (0, 1, 2, 3)),
    "FalconMamba": (dict(state_size=4), (0, 1, 2, 3)),
    "Jamba": (
        dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2, mamba_d_state=4),
        (0, 2),
    ),
    "Mamba2": (MAMBA2 | dict(time_step_limit=(0.2, 0.9)), (0, 1, 2, 3)),
    "Bamba": (HYBRID | dict(attn_layer_indices=[1, 3]), (0, 2)),
    "Zamba2": (ZAMBA2 | dict(layers_block_type=TYPES), (0, 1, 2, 3)),
    "FalconH1": (HYBRID | dict(mamba_d_ssm=64, head_dim=8, ssm_multipliers=[0.9, 0.8, 0.7, 0.6, 0.5]), (0, 1, 2, 3)),
    "NemotronH": (
        dict(layers_block_type=["mamba", "attention", "mamba", "moe"], mamba_num_heads=8, mamba_head_dim=8)
        | dict(ssm_state_size=8, n_groups=1, chunk_size=16, n_routed_experts=4, moe_intermediate_size=16, head_dim=8)
        | dict(moe_shared_expert_intermediate_size=16, num_experts_per_tok=2),
        (0, 2),
    ),
    "GraniteMoeHybrid": (
        HYBRID | dict(layer_types=["mamba", "attention"] * 2, num_local_experts=2, num_experts_per_tok=1),
        (0, 2),
    ),
}
ZAMBA = dict(layers_block_type=TYPES, n_mamba_heads=2, mamba_d_state=4, attention_hidden_size=64)


def build(family: str, **changes: Any) -> nn.Module:
    """A model in training mode whose rates spread over several orders of magnitude, other in every head and block."""
    options = MODELS[family][0] if family in MODELS else {"Zamba": ZAMBA}.get(family, {})
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options, **changes})
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] == "dt_bias" or name.endswith(("dt_proj.bias", "dt_layernorm.weight")):
                parameter.add_(2 * torch.randn_like(parameter))
            if name.endswith("A_log"):
                parameter.add_(torch.randn_like(parameter))
            if name.endswith(("in_proj.weight", "x_proj.weight", "dt_proj.weight")):
                parameter.mul_(4)
    return model.train()


class Scans:
    """The rates Δ·min|A| of every scan that runs, `[B, T, H]` in float64, from what the scan itself is given."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rates: list[Tensor] = []
        module = sys.modules[type(model).__module__]
        for name in ("mamba_selective_scan", "mamba2_chunk_scan"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, self._spy(getattr(module, name)))

    def _spy(self, scan):
        def spy(*args, **kwargs):
            given = inspect.signature(scan).bind(*args, **kwargs).arguments
            if torch._C._current_graph_task_id() == -1:  # not again in backward, under checkpointing
                self.rates.append(self._rates(given))
            return scan(*args, **kwargs)

        return spy

    @staticmethod
    @torch.no_grad()
    def _rates(given: dict[str, Any]) -> Tensor:
        if "delta_bias" in given:  # Mamba: [B, H, T] and [H, N]
            delta = softplus((given["dt"] + given["delta_bias"].to(given["dt"].dtype)[:, None]).double())
            return (delta * -given["A"].double().amax(1)[:, None]).transpose(1, 2)
        delta = softplus((given["dt"] + given["dt_bias"].to(given["dt"].dtype)).double())
        return delta.clamp(*given["dt_limit"]) * -given["A"].double()
