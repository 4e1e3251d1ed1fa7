"""A small residual model whose states are easy to know, and the loop that trains it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Toy(nn.Module):
    """Embedding, a list of residual blocks with dropout, a head. `checkpointing`: None, "reentrant" or "default"."""

    def __init__(self, blocks: int = 3, width: int = 16, checkpointing: str | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 32)
        self.checkpointing = checkpointing

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        del attention_mask  # the monitor reads it; these blocks have no use for it
        x = self.embed(ids)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(x)))


def record_states(model: Any) -> list[Tensor]:
    """Hooks of one's own: the returned list fills with h^(0..L) of every forward that is not a recomputation."""
    seen: list[Tensor] = []

    def keep(value: Tensor) -> None:
        if torch._C._current_graph_task_id() == -1:
            seen.append(value.detach().clone())

    model.blocks[0].register_forward_pre_hook(lambda module, args: keep(args[0]))
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: keep(output))
    return seen


def batch(rows: int = 4, tokens: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 32, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return nn.functional.cross_entropy(model(ids, mask).flatten(0, 1), ids.flatten())
