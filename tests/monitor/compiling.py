"""The ways in which people compile a model, and how to count what the compiler does."""

from typing import Any

import torch
from torch._dynamo.utils import counters

STYLES = ("whole", "in place", "fullgraph", "each block", "each block wrapped")


def compile_model(model: Any, style: str, **options: Any) -> Any:
    """`model` or its blocks, compiled; what the training loop calls is returned."""
    if style == "whole":
        return torch.compile(model, **options)
    if style == "fullgraph":
        return torch.compile(model, fullgraph=True, **options)
    if style == "in place":
        model.compile(fullgraph=True, **options)
    elif style == "each block":
        for block in model.blocks:
            block.compile(fullgraph=True, **options)
    else:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = torch.compile(block, fullgraph=True, **options)
    return model


def graphs_and_breaks() -> tuple[int, int]:
    """Graphs that were compiled, and breaks between them, since the last call."""
    counts = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    counters.clear()
    return counts
