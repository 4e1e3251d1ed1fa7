"""What the tests of slices of sequences on two ranks share, under either trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repflow.monitor import open_run
from repflow.monitor.functional import inter_token_similarity


class States:
    """Keeps h^(0..L) of every forward of a GPT-NeoX, with the mask that it received."""

    def __init__(self, model: Any) -> None:
        self._forwards: list[list[Tensor]] = []
        self._masks: list[Tensor] = []
        layers = model.gpt_neox.layers
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        layers[0].register_forward_pre_hook(lambda layer, args: self._keep(args[0]))
        for layer in layers:
            layer.register_forward_hook(lambda layer, args, output: self._keep(output))

    def _begin(self, model: object, args: object, given: dict[str, Tensor]) -> None:
        self._masks.append(given["attention_mask"].clone())
        self._forwards.append([])

    def _keep(self, state: Any) -> None:
        self._forwards[-1].append((state if isinstance(state, Tensor) else state[0]).detach().clone())

    def save(self, path: Path) -> None:
        """Of each forward the states `[S, B, T/2, D]` and the mask `[B, T/2]`."""
        states = [torch.stack(forward) for forward in self._forwards]
        torch.save((states, self._masks), path)


def cut(values: Tensor, rank: int) -> Tensor:
    """The slice of a rank of `[B, T]`: of unequal length, so that each rank must name its own."""
    first = values.shape[1] // 2 - 1
    return values[:, :first] if rank == 0 else values[:, first:]


def check_whole_sequences(folder: Path, run: Path) -> None:
    """A run file has the similarity of the sequences that both ranks' slices make up, step by step."""
    (ours, our_masks), (theirs, their_masks) = (torch.load(folder / f"states{rank}.pt") for rank in range(2))
    data = open_run(run)
    assert len(data.step) == len(ours) == len(theirs) > 0
    for step, (states, mask) in enumerate(
        zip(
            (torch.cat(pair, dim=2) for pair in zip(ours, theirs, strict=True)),
            (torch.cat(pair, dim=1) for pair in zip(our_masks, their_masks, strict=True)),
            strict=True,
        )
    ):
        expected = inter_token_similarity(states.double(), mask != 0).mean(1)
        np.testing.assert_allclose(data.inter_token[step], expected, atol=1e-6)
        assert (int(data.sequences[step]), int(data.tokens[step])) == (len(mask), int((mask != 0).sum()))
