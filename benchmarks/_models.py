"""Models to train, with random weights, and one training step of each."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded; read when transformers is imported

StepContext = Callable[[int], AbstractContextManager[None]]
"""What surrounds an optimizer step, from its number."""


@dataclass(frozen=True)
class Shape:
    """A model, and the batch that one optimizer step takes."""

    name: str
    family: str
    """"gpt_neox" or "mamba2" of transformers, or "mamba_ssm"."""
    options: dict[str, Any]
    """Of its configuration."""
    rows: int
    tokens: int
    micro_batches: int = 1
    """Into how many forwards the rows are cut."""
    note: str = ""

    @property
    def layers(self) -> int:
        """L, the number of blocks."""
        return self.options["n_layer" if self.family == "mamba_ssm" else "num_hidden_layers"]

    @property
    def hidden(self) -> int:
        """D, the number of features."""
        return self.options["d_model" if self.family == "mamba_ssm" else "hidden_size"]

    def build(self, device: torch.device) -> nn.Module:
        """The model in bf16 and training mode, with random weights."""
        if self.family == "mamba_ssm":
            # docs/mamba_ssm.md tells how to build it
            from mamba_ssm import MambaLMHeadModel  # pyright: ignore[reportMissingImports]
            from mamba_ssm.models.config_mamba import MambaConfig  # pyright: ignore[reportMissingImports]

            return MambaLMHeadModel(MambaConfig(**self.options), device=device, dtype=torch.bfloat16).train()
        import transformers

        config_class = {"gpt_neox": transformers.GPTNeoXConfig, "mamba2": transformers.Mamba2Config}[self.family]
        config = config_class(**self.options, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        attention = {"attn_implementation": "sdpa"} if self.family == "gpt_neox" else {}
        with device:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **attention)
        return model.to(device).train()

    def columns(self) -> dict[str, object]:
        """What tells one shape from another in the results."""
        per_step = self.rows * self.tokens
        return {
            "model": self.name, "layers": self.layers, "hidden": self.hidden,
            "tokens_per_step": per_step, "micro_batches": self.micro_batches, "note": self.note,
        }  # fmt: skip


def gpt_neox(name: str, hidden: int, layers: int, heads: int, vocabulary: int, rows: int, tokens: int) -> Shape:
    """A decoder with parallel attention and an MLP of four times the width."""
    options: dict[str, Any] = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * hidden, "vocab_size": vocabulary, "max_position_embeddings": tokens,
    }  # fmt: skip
    return Shape(name, "gpt_neox", options, rows, tokens)


def mamba2(name: str, hidden: int, layers: int, state: int, head_dim: int, vocabulary: int) -> Shape:
    """A state-space model on the PyTorch path of transformers, which runs everywhere, and slowly: to try things out."""
    options: dict[str, Any] = {
        "hidden_size": hidden, "num_hidden_layers": layers, "state_size": state, "head_dim": head_dim, "expand": 2,
        "num_heads": 2 * hidden // head_dim, "n_groups": 1, "vocab_size": vocabulary, "chunk_size": 8,
    }  # fmt: skip
    return Shape(name, "mamba2", options, 2, 24)


def mamba_ssm(name: str, hidden: int, layers: int, vocabulary: int, rows: int, tokens: int) -> Shape:
    """A state-space model on its own kernels, as it is trained."""
    options: dict[str, Any] = {
        "d_model": hidden, "n_layer": layers, "vocab_size": vocabulary, "ssm_cfg": {"layer": "Mamba2"},
    }  # fmt: skip
    return Shape(name, "mamba_ssm", options, rows, tokens, note="kernels of mamba_ssm; the residual stream is float32")


SHAPES = (
    gpt_neox("GPTNeoX 410M", 1024, 24, 16, 50304, 8, 2048),
    gpt_neox("GPTNeoX 1.4B", 2048, 24, 16, 50304, 8, 2048),
    mamba_ssm("Mamba2 370M", 1024, 48, 50288, 8, 2048),
)
QUICK_SHAPES = (
    gpt_neox("GPTNeoX tiny", 32, 3, 2, 64, 4, 24),
    mamba2("Mamba2 tiny", 32, 3, 8, 8, 64),
)


class Training:
    """A model, its optimizer and one batch of random tokens, which every step trains on again."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.model = shape, shape.build(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device.type == "cuda")
        ids = torch.randint(0, shape.options["vocab_size"], (shape.rows, shape.tokens), device=device)
        self.batches: tuple[Tensor, ...] = ids.chunk(shape.micro_batches)

    def loss(self, ids: Tensor) -> Tensor:
        """The mean cross-entropy of each next token."""
        if self.shape.family != "mamba_ssm":
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss
        logits = self.model(ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def step(self, number: int = 0, context: StepContext = lambda number: nullcontext()) -> None:
        """One optimizer step, its forwards and backwards inside of `context`."""
        with context(number):
            for ids in self.batches:
                (self.loss(ids) / len(self.batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Blocks(nn.Module):
    """As many blocks as a model has, each next to nothing: what is left is the work of the CPU."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        """States `[B, T, D]` through all blocks."""
        for block in self.blocks:
            x = block(x)
        return x
