"""A model to regularize, and the same training with the term written into the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from repflow.callbacks import RepresentationRegularizer
from repflow.triton_kernels.groups import find_groups
from tests.monitor import toy

LAYERS = (1, 3)
TARGET = -0.2
STRENGTH = 0.7


def model(dtype: torch.dtype = torch.float64, **options: Any) -> toy.Toy:
    """The same every time, with tokens alike enough for the term, and without dropout."""
    torch.manual_seed(5)
    made = toy.Toy(**options)
    with torch.no_grad():
        made.embed.weight += 1.0
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made.to(dtype)


def llama() -> Any:
    """A small language model that returns its loss."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().train()


def attached(net: Any, **options: Any) -> RepresentationRegularizer:
    """A regularizer that acts on the model."""
    given = {"target": TARGET, "layers": list(LAYERS), "strength": STRENGTH, **options}
    return RepresentationRegularizer(**given).attach(net)


def term(states: list[Tensor], mask: Tensor | None, target: float = TARGET, contrastive: bool = False) -> Tensor:
    """Σ over states of max(0, similarity − target), through the cosines of all pairs."""
    total = states[0].new_zeros(())
    for state in states:
        groups = find_groups(torch.ones(state.shape[:2], dtype=torch.bool) if mask is None else mask)
        found = []
        for group in range(groups.count):
            unit = nn.functional.normalize(state[groups.index == group], dim=-1)
            if len(unit) > 1:
                pairs = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
                found.append((pairs - target).clamp(min=0).mean() if contrastive else pairs.mean())
        mean = torch.stack(found).mean()
        total = total + (mean if contrastive else (mean - target).clamp(min=0))
    return total


@contextmanager
def states_of(blocks: Any, layers: tuple[int, ...] = LAYERS) -> Iterator[list[Tensor]]:
    """What the chosen blocks return inside, with its graph."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [blocks[layer - 1].register_forward_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gradients(net: nn.Module) -> list[Tensor]:
    """Of all parameters, which are set back to none."""
    found = [parameter.grad.detach().clone() for parameter in net.parameters() if parameter.grad is not None]
    net.zero_grad()
    return found


def assert_same(got: list[Tensor], want: list[Tensor], rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """The same gradients, but for rounding."""
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
