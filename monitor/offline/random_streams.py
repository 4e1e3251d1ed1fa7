"""How alike tokens are in a model that was never trained: the data of figures 3, 5, 6 and 7."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from repflow.monitor.offline import BeyondWindowError
from repflow.monitor.offline.initialisation import (
    Initialisation,
    NormVariant,
    embedding_scaled,
    initialise,
    norms_as,
)
from repflow.monitor.offline.loading import load_model
from repflow.monitor.offline.recorder import StateRecorder
from repflow.monitor.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class RandomStream:
    """What tokens do in a model drawn at random."""

    inter_token: Float64[Tensor, " S"]
    """Inter-token similarity of h^(l)."""
    update_inter_token: Float64[Tensor, " S-1"]
    """The same of Δh^(l), what a block adds."""
    norms: Float64[Tensor, " S"]
    """Mean length of h^(l)."""
    nonfinite: Int64[Tensor, " S"]
    """Tokens with a NaN or an infinity: left out of the others."""
    choices: dict[str, Any]
    """Every choice, as plain values."""


def random_ids(vocabulary: int, *, sequences: int = 1, tokens: int = 2048, seed: int = 0) -> Int64[Tensor, "B T"]:
    """Uniform ids, the same on every device: the protocol `random_ids`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, vocabulary, (sequences, tokens), generator=generator)


def random_stream(
    name: str,
    choice: Initialisation,
    *,
    norms: NormVariant = "baseline",
    embedding_scale: float = 1.0,
    scaled_positions: bool = False,
    tokens: int = 2048,
    sequences: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> RandomStream:
    """Draw a model from its configuration, run random ids through it, and measure its stream.

    Args:
        name: whose configuration it is; see `load_model`.
        choice: how it is drawn. Its seed is that of the ids, too.
        norms: see `norms_as`.
        embedding_scale: see `embedding_scaled`.
        scaled_positions: see `embedding_scaled`.
        tokens: of each sequence.
        sequences: of the one batch.
        dtype: of the weights.
        device: where to; the GPU if None and there is one.

    Raises:
        BeyondWindowError: `tokens` is more than the window of the model.
        OfflineError: there is no such configuration, or it is of a model that cannot be followed.
    """
    loaded = load_model(name, init=True, seed=choice.seed, dtype=dtype, device=device)
    if loaded.window is not None and tokens > loaded.window:
        raise BeyondWindowError(f"{name}: skipped {tokens:,} tokens: the model's window is {loaded.window:,}")
    roles = initialise(loaded.model, choice)
    ids = random_ids(loaded.vocabulary, sequences=sequences, tokens=tokens, seed=choice.seed)
    with (
        norms_as(loaded.model, norms) as changed,
        embedding_scaled(loaded.model, embedding_scale, positions=scaled_positions),
        StateRecorder(loaded.model, metrics=("inter_token",)) as recorder,
    ):
        sums = recorder.measure(ids.to(loaded.device)).sums.cpu()
    found = Snapshot.from_sums(
        sums, num_states=recorder.layout.num_states, step=0, stream=recorder.stream.name, overhead_ms=0.0
    )
    choices = {
        "protocol": "random_ids",
        "states": "residual",
        "norms": norms,
        "norms_changed": changed,
        "embedding_scale": embedding_scale,
        "embedding_scale_of": "tokens and positions" if scaled_positions else "tokens",
        "tokens": tokens,
        "sequences": sequences,
        "parameters": roles,
    }
    return RandomStream(
        found.inter_token,
        found.update_inter_token,
        found.norms,
        found.nonfinite,
        loaded.describe() | choice.describe() | choices,
    )
