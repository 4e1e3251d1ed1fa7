"""Models that are not of transformers, in the conventions that people write: small, random, with checkpointing."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Model(nn.Module):
    """Checkpoints its blocks if it is asked to, as models of transformers do."""

    checkpointing = False

    def gradient_checkpointing_enable(self) -> None:
        self.checkpointing = True

    def run(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False, **kwargs)
        return block(*args, **kwargs)


class SelectiveScan(nn.Module):
    """A linear recurrence with a decay per channel, under the names of mamba_ssm's mixers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * width)
        self.A_log = nn.Parameter(torch.zeros(width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, inference_params: object = None) -> Tensor:
        value, gate = self.in_proj(x).chunk(2, -1)
        state, out = torch.zeros_like(value[:, 0]), []
        for step in value.unbind(1):
            state = torch.exp(-self.A_log.exp()) * state + step
            out.append(state)
        return self.out_proj(torch.stack(out, 1) * F.silu(gate))


class MHA(nn.Module):
    """Attention under the names of mamba_ssm, of which only the class says what it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, inference_params: object = None) -> Tensor:
        q, k, v = self.in_proj(x).chunk(3, -1)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class MambaLikeBlock(nn.Module):
    """Add -> norm -> mixer, (hidden, residual) -> (hidden, residual). `fused`: no norm is called as a module."""

    def __init__(self, width: int, parts: str, fused: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixer = MHA(width) if "attention" in parts else SelectiveScan(width)
        if "mlp" in parts:
            self.norm2 = nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))
        self.fused = fused

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: object = None
    ) -> tuple[Tensor, Tensor]:
        hidden_states, residual = add_norm(self.norm, hidden_states, residual, self.fused)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params)
        if hasattr(self, "mlp"):
            hidden_states, residual = add_norm(self.norm2, hidden_states, residual, self.fused)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def add_norm(norm: nn.LayerNorm, hidden: Tensor, residual: Tensor | None, fused: bool) -> tuple[Tensor, Tensor]:
    """The sum in float32, and its norm in the dtype of the weights."""
    residual = (hidden if residual is None else hidden + residual).float()
    x = residual.to(norm.weight.dtype)
    return (F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias) if fused else norm(x)), residual


class MambaLike(Model):
    """What `mamba_ssm.MambaLMHeadModel` is to whoever looks at it from outside."""

    def __init__(self, parts: Sequence[str], vocabulary: int, width: int = 16, fused: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(vocabulary, width)
        self.backbone.layers = nn.ModuleList([MambaLikeBlock(width, part, fused) for part in parts])
        self.backbone.norm_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary)
        self.fused = fused

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden, residual = self.backbone.get_submodule("embedding")(input_ids), None
        for block in self.backbone.get_submodule("layers").children():
            hidden, residual = self.run(block, hidden, residual, inference_params=None)
        norm = self.backbone.get_submodule("norm_f")
        assert isinstance(norm, nn.LayerNorm)
        return self.lm_head(add_norm(norm, hidden, residual, self.fused)[0])


class LoraLinear(nn.Module):
    """A frozen layer and its low-rank update, under PEFT's names."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class LoraModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        for module in list(model.modules()):
            for name in ("q_proj", "up_proj"):
                if isinstance(layer := getattr(module, name, None), nn.Linear):
                    setattr(module, name, LoraLinear(layer))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def enable_checkpointing(model: Any) -> None:
    """Under the name of this version of transformers, or the one that models here have."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


class PeftModel(nn.Module):
    """The structure of a model under PEFT's LoRA: `base_model.model` is the model, and its base is frozen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = LoraModel(model)

    def gradient_checkpointing_enable(self) -> None:
        enable_checkpointing(self.base_model.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class TorchEncoder(nn.Module):
    """`torch.nn.TransformerEncoder` between an embedding and a head. It has no checkpointing of its own."""

    def __init__(self, vocabulary: int, batch_first: bool, width: int = 16) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=batch_first)
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.batch_first = batch_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return self.head(x if self.batch_first else x.transpose(0, 1))


class PlainBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(x)))


class Plain(Model):
    """Embedding, blocks, head; `numbered`: the blocks are in a ModuleDict."""

    def __init__(self, vocabulary: int, width: int = 16, numbered: bool = False) -> None:
        super().__init__()
        blocks = [PlainBlock(width) for _ in range(3)]
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleDict({str(i): b for i, b in enumerate(blocks)}) if numbered else nn.ModuleList(blocks)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks.children():
            x = self.run(block, x)
        return self.head(x)
