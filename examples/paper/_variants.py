"""The three families at about 48 million parameters, and the transformer with frozen norms and without norms."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

Norms = Literal["trained", "frozen", "none"]
TOKENS = 512
"""Of a row; also the window of those models that have one."""
_NO_NORM = 2.0**20
"""Epsilon beside which no variance of the stream matters."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the three families are built from."""

    width: int
    blocks: int
    head: int
    """Features of a head, of attention and of state spaces."""
    state: int
    attention: tuple[int, ...]
    """Blocks of the hybrid that have attention."""
    ssm_width: int
    """Of the state-space model, so that it has as many parameters as the others, and of heads a multiple of 8: what
    `causal_conv1d` reads begins behind gate and heads, and must be aligned."""
    ssm_blocks: int


FULL = Sizes(width=512, blocks=14, head=64, state=128, attention=(3, 7, 11), ssm_width=768, ssm_blocks=11)
TINY = Sizes(width=32, blocks=3, head=16, state=8, attention=(1,), ssm_width=32, ssm_blocks=3)
FAMILIES = ("transformer", "ssm", "hybrid")
LEARNING_RATES: Mapping[Norms, float] = {"trained": 1e-3, "frozen": 1e-3, "none": 5e-4}
"""The peak. Without norms nothing holds back a step that is too large."""


def variant_name(family: str, norms: Norms) -> str:
    """What a variant is called, such as `transformer-no-norms`."""
    return family + {"trained": "", "frozen": "-frozen-norms", "none": "-no-norms"}[norms]


def build(family: str, norms: Norms, sizes: Sizes, vocabulary: int, end: int) -> PreTrainedModel:
    """A causal language model with random weights from torch's global generator.

    Args:
        family: one of `FAMILIES`.
        norms: whether norms learn, stay at weight 1 and bias 0, or do nothing; see `_without_norms`.
        sizes: of the model.
        vocabulary: tokens.
        end: the token that ends a text.
    """
    special = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    model = _FAMILIES[family](sizes, special)
    if norms == "frozen":
        for norm in _norms(model):
            norm.requires_grad_(False)
    elif norms == "none":
        _without_norms(model)
    return model


def _transformer(sizes: Sizes, special: dict[str, Any]) -> PreTrainedModel:
    config = transformers.GPTNeoXConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.width // sizes.head,
        intermediate_size=4 * sizes.width,
        max_position_embeddings=TOKENS,
        **special,
    )
    return transformers.GPTNeoXForCausalLM(config)


def _ssm(sizes: Sizes, special: dict[str, Any]) -> PreTrainedModel:
    config = transformers.Mamba2Config(
        hidden_size=sizes.ssm_width,
        num_hidden_layers=sizes.ssm_blocks,
        head_dim=sizes.head,
        num_heads=2 * sizes.ssm_width // sizes.head,
        state_size=sizes.state,
        n_groups=1,
        chunk_size=32,  # without fused kernels, the memory of a chunk grows with its square
        initializer_range=0.02,  # the library's .1 starts at a loss well above that of guessing
        **special,
    )
    return transformers.Mamba2ForCausalLM(config)


def _hybrid(sizes: Sizes, special: dict[str, Any]) -> PreTrainedModel:
    config = transformers.BambaConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.width // sizes.head,
        num_key_value_heads=sizes.width // sizes.head,
        intermediate_size=2 * sizes.width,
        max_position_embeddings=TOKENS,
        attn_layer_indices=list(sizes.attention),
        mamba_d_head=sizes.head,
        mamba_n_heads=2 * sizes.width // sizes.head,
        mamba_d_state=sizes.state,
        mamba_chunk_size=32,
        **special,
    )
    return transformers.BambaForCausalLM(config)


_FAMILIES: dict[str, Callable[[Sizes, dict[str, Any]], PreTrainedModel]] = {
    "transformer": _transformer,
    "ssm": _ssm,
    "hybrid": _hybrid,
}


def _norms(model: nn.Module) -> list[nn.LayerNorm]:
    found = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if not found:
        raise SystemExit(f"--norms: expected a model with LayerNorm, which is the transformer's; got {type(model)}")
    return found


@torch.no_grad()
def _without_norms(model: PreTrainedModel) -> None:
    """Let every norm take the mean over features away, and nothing else, in a checkpoint that any program loads.

    A LayerNorm of epsilon E and fixed weight √E gives (x − x̄)·√(E / (var + E)): x − x̄ but for a share of var / 2E. What
    is taken away is one direction of 512, and linear.

    The norm is also what lifts tokens to the size that weights are drawn for, and what keeps a sum of many blocks in
    bounds. In its place token embeddings are drawn with variance 1, and what blocks add is scaled by 1/√(2L).
    """
    for norm in _norms(model):
        norm.eps = _NO_NORM
        norm.weight.fill_(math.sqrt(_NO_NORM))
        norm.requires_grad_(False)
    model.config.layer_norm_eps = _NO_NORM
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    embedding.normal_()
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            parameter /= math.sqrt(2 * model.config.num_hidden_layers)
