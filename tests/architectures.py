"""Every model that repflow is held to: tiny and random, with what is true of it, told without asking repflow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests import handwritten

ROWS, TOKENS, VOCABULARY = 3, 12, 64


def first(output: Any) -> Tensor:
    """The tensor, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True, eq=False)
class Architecture:
    """One model, or one stream of a model that has two."""

    name: str
    build: Callable[[], nn.Module]
    path: str
    """Where its list of blocks is."""
    parts: Sequence[str]
    """Of each block, as in `ssm+mlp`."""
    kinds: Sequence[str]
    taken: Callable[[Tensor], Tensor] = lambda state: state
    """From the first argument of the first block to h^(0)."""
    returned: Callable[[Any], Tensor] = first
    """From what a block returns to h^(l)."""
    stream: str | None = None
    classes: Sequence[str] = ()
    """The class and the config in transformers; empty for other models."""
    arguments: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    """More arguments of the model."""
    mask: Callable[[Tensor, Tensor], Tensor] = lambda ids, mask: mask
    """Where the stream has tokens, if its tokens are not the model's."""

    @property
    def missing(self) -> list[str]:
        """What this version of transformers lacks."""
        return [name for name in self.classes if not hasattr(transformers, name)]


ATTENTION, SSM, RECURRENT = "attention+mlp", "ssm", "recurrent+mlp"
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED: dict[str, Any] = dict(num_key_value_heads=2)
MAMBA2: dict[str, Any] = dict(
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, **GROUPED
)
NEMOTRON: dict[str, Any] = dict(
    head_dim=8, ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=8, n_groups=1, chunk_size=8, **GROUPED
)
T5: dict[str, Any] = dict(
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_hidden_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
    dropout_rate=0.0,
)


def of_transformers(
    family: str,
    path: str,
    parts: Sequence[str],
    *,
    suffix: str = "ForCausalLM",
    config: str | None = None,
    note: str = "",
    stream: str | None = None,
    arguments: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {},
    mask: Callable[[Tensor, Tensor], Tensor] = lambda ids, mask: mask,
    **options: Any,
) -> Architecture:
    """A class of transformers."""
    model_class, config_class = f"{family}{suffix}", config or f"{family}Config"

    def build() -> nn.Module:
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**{**SMALL, **options}))

    return Architecture(
        name=f"{model_class}{note}",
        build=build,
        path=path,
        parts=parts,
        kinds=[kind_of(part) for part in parts],
        stream=stream,
        classes=(model_class, config_class),
        arguments=arguments,
        mask=mask,
    )


def kind_of(parts: str) -> str:
    """The mixer, `hybrid` for two, or what there is instead of one."""
    mixers = [part for part in parts.split("+") if part in ("attention", "ssm", "recurrent", "conv")]
    return "hybrid" if len(mixers) > 1 else (mixers or parts.split("+"))[0]


def targets(ids: Tensor) -> dict[str, Tensor]:
    """For a decoder: shorter than the encoder's input."""
    return {"labels": ids[:, :8].contiguous()}


def all_of_labels(ids: Tensor, mask: Tensor) -> Tensor:
    return torch.ones_like(ids[:, :8])


def peft_stand_in() -> nn.Module:
    return handwritten.PeftModel(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **GROUPED})))


def plain(name: str, build: Callable[[], nn.Module], path: str, parts: Sequence[str], **options: Any) -> Architecture:
    """A model that is not of transformers."""
    return Architecture(name, build, path, parts, [kind_of(part) for part in parts], **options)


def mamba_ssm(name: str, parts: Sequence[str], **options: Any) -> Architecture:
    return plain(
        f"mamba_ssm's calling convention, {name}",
        lambda: handwritten.MambaLike(parts, VOCABULARY, **options),
        "backbone.layers",
        parts,
        returned=lambda output: output[0] + output[1],
    )


ARCHITECTURES: list[Architecture] = [
    of_transformers(
        "GPTNeo",
        "transformer.h",
        [ATTENTION] * 3,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global"], 1], [["local"], 2]],
    ),
    of_transformers("GPTNeoX", "gpt_neox.layers", [ATTENTION] * 3),
    of_transformers("GPT2", "transformer.h", [ATTENTION] * 3, suffix="LMHeadModel", n_embd=32, n_layer=3, n_head=4),
    of_transformers("Llama", "model.layers", [ATTENTION] * 3, **GROUPED),
    of_transformers("Qwen3", "model.layers", [ATTENTION] * 3, head_dim=8, **GROUPED),
    of_transformers("Gemma3", "model.layers", [ATTENTION] * 3, config="Gemma3TextConfig", head_dim=8, **GROUPED),
    of_transformers("Mamba", "backbone.layers", [SSM] * 3, state_size=4),
    of_transformers(
        "Mamba2", "backbone.layers", [SSM] * 3, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8
    ),
    of_transformers("FalconMamba", "backbone.layers", [SSM] * 3, state_size=4),
    of_transformers(
        "Jamba",
        "model.layers",
        ["ssm+mlp", "attention+moe", "ssm+mlp"],
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        **GROUPED,
    ),
    of_transformers(
        "Zamba",
        "model.layers",
        [SSM, "attention+ssm+mlp"] * 2,
        num_hidden_layers=4,
        num_key_value_heads=4,
        mamba_d_state=4,
        n_mamba_heads=2,
        layers_block_type=["mamba", "hybrid"] * 2,
    ),
    of_transformers(
        "Zamba2",
        "model.layers",
        [SSM, "attention+ssm+mlp", SSM],
        mamba_d_state=8,
        n_mamba_heads=8,
        chunk_size=8,
        layers_block_type=["mamba", "hybrid", "mamba"],
    ),
    of_transformers("Bamba", "model.layers", ["ssm+mlp", ATTENTION, "ssm+mlp"], attn_layer_indices=[1], **MAMBA2),
    of_transformers("FalconH1", "model.layers", ["attention+ssm+mlp"] * 3, mamba_d_ssm=64, **MAMBA2),
    of_transformers(
        "NemotronH",
        "model.layers",
        [SSM, "attention", "mlp"],
        layers_block_type=["mamba", "attention", "mlp"],
        **NEMOTRON,
    ),
    of_transformers(
        "NemotronH",
        "model.layers",
        [SSM, "attention", "moe"],
        note=" with MoE",
        layers_block_type=["mamba", "attention", "moe"],
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        **NEMOTRON,
    ),
    of_transformers(
        "GraniteMoeHybrid",
        "model.layers",
        ["ssm+moe+mlp", "attention+moe+mlp", "ssm+moe+mlp"],
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=16,
        **MAMBA2,
    ),
    of_transformers(
        "Qwen3Next",
        "model.layers",
        ["recurrent+moe", "attention+moe", RECURRENT],
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[2],
        **GROUPED,
    ),
    of_transformers(
        "OlmoHybrid",
        "model.layers",
        [RECURRENT, ATTENTION, RECURRENT],
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **GROUPED,
    ),
    of_transformers(
        "RecurrentGemma",
        "model.layers",
        [RECURRENT, ATTENTION, RECURRENT],
        block_types=["recurrent", "attention", "recurrent"],
        lru_width=32,
        attention_window_size=8,
        **GROUPED,
    ),
    of_transformers(
        "xLSTM", "backbone.blocks", [RECURRENT] * 3, num_blocks=3, num_heads=4, chunk_size=8, use_cache=False
    ),
    of_transformers(
        "Lfm2",
        "model.layers",
        ["conv+mlp", ATTENTION, "conv+mlp"],
        layer_types=["conv", "full_attention", "conv"],
        **GROUPED,
    ),
    of_transformers("Bert", "bert.encoder.layer", [ATTENTION] * 3, suffix="ForMaskedLM"),
    of_transformers("T5", "encoder.block", [ATTENTION] * 2, suffix="EncoderModel", **T5),
    *(
        of_transformers(
            "T5",
            f"{stream}.block",
            [ATTENTION] * 2,
            suffix="ForConditionalGeneration",
            note=f', stream="{stream}"',
            stream=stream,
            arguments=targets,
            mask=mask,
            **T5,
        )
        for stream, mask in (("encoder", lambda ids, mask: mask), ("decoder", all_of_labels))
    ),
    plain(
        "LlamaForCausalLM under PEFT's LoRA (its structure)",
        peft_stand_in,
        "base_model.model.model.layers",
        [ATTENTION] * 3,
    ),
    mamba_ssm("unfused", [SSM, "attention", SSM]),
    mamba_ssm("fused", [SSM, "attention", SSM], fused=True),
    mamba_ssm("with an MLP", ["ssm+mlp", ATTENTION], fused=True),
    plain(
        "torch.nn.TransformerEncoder",
        lambda: handwritten.TorchEncoder(VOCABULARY, batch_first=False),
        "encoder.layers",
        [ATTENTION] * 2,
        taken=lambda state: state.transpose(0, 1),
        returned=lambda output: output.transpose(0, 1),
    ),
    plain(
        "torch.nn.TransformerEncoder, batch_first=True",
        lambda: handwritten.TorchEncoder(VOCABULARY, batch_first=True),
        "encoder.layers",
        [ATTENTION] * 2,
    ),
    plain("a ModuleList of one's own", lambda: handwritten.Plain(VOCABULARY), "blocks", ["other"] * 3),
    plain(
        "a ModuleDict with numbers for keys",
        lambda: handwritten.Plain(VOCABULARY, numbered=True),
        "blocks",
        ["other"] * 3,
    ),
]
