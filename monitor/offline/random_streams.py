"""How alike tokens are in a model that was never trained: the data of figures 3, 5, 6 and 7."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from repflow.monitor.offline import BeyondWindowError, OfflineError
from repflow.monitor.offline.initialisation import (
    VECTOR_ROLES,
    Initialisation,
    NormVariant,
    Role,
    drawn_roles,
    embedding_scaled,
    initialise,
    norms_as,
    role_of,
)
from repflow.monitor.offline.loading import LoadedModel, load_config, load_model, scan_of, window_of
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


class RandomModel:
    """A model of one configuration and seed, drawn again and again where it lies: on the device, without the host.

    A context manager: inside of it the model has memory and hooks.

    Args:
        name: whose configuration it is; see `load_model`.
        seed: of what transformers draws, of everything drawn after it, and of the ids.
        tokens: of each sequence.
        sequences: of the one batch.
        dtype: of the weights.
        device: where to; the GPU if None and there is one.

    Raises:
        BeyondWindowError: `tokens` is more than the window of the model.
        OfflineError: there is no such configuration, or it is of a model that cannot be followed.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        *,
        tokens: int = 2048,
        sequences: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self._load = lambda: load_model(name, init=True, seed=seed, dtype=dtype, device=device)
        self._seed, self._tokens, self._sequences = seed, tokens, sequences
        window = window_of(load_config(name))
        if window is not None and tokens > window:
            raise BeyondWindowError(f"{name}: skipped {tokens:,} tokens: the model's window is {window:,}")

    def __enter__(self) -> "RandomModel":
        self._stack = ExitStack()
        self._place(self._load())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        del self._loaded, self._recorder, self._vectors

    def _place(self, loaded: LoadedModel) -> None:
        self._loaded, self._overwritten, self._drawn = loaded, set[Role](), None
        self._vectors = {
            parameter: parameter.detach().clone()
            for name, module in loaded.model.named_modules()
            for leaf, parameter in module.named_parameters(recurse=False)
            if role_of(module, f"{name}.{leaf}", parameter) in VECTOR_ROLES
        }
        self._recorder = self._stack.enter_context(StateRecorder(loaded.model, metrics=("inter_token",)))
        self._ids = random_ids(loaded.vocabulary, sequences=self._sequences, tokens=self._tokens, seed=self._seed).to(
            loaded.device
        )

    def _draw(self, choice: Initialisation) -> dict[str, int]:
        """The model as `choice` says, whatever was drawn before."""
        if choice.seed != self._seed:
            raise OfflineError(f"random streams: expected a choice of seed {self._seed}, got one of seed {choice.seed}")
        drawn = drawn_roles(choice)
        if self._overwritten - drawn:  # what is wanted as transformers draws it
            self._stack.close()
            del self._loaded, self._recorder, self._vectors
            self._place(self._load())
        with torch.no_grad():
            for parameter, values in self._vectors.items():
                parameter.copy_(values)
        self._overwritten |= drawn
        return initialise(self._loaded.model, choice)

    def stream(
        self,
        choice: Initialisation,
        *,
        norms: NormVariant = "baseline",
        embedding_scale: float = 1.0,
        scaled_positions: bool = False,
    ) -> RandomStream:
        """Draw the model, run random ids through it, and measure its stream.

        The same choices give the same stream, whatever was asked for before.

        Args:
            choice: how it is drawn; of the seed of this model.
            norms: see `norms_as`.
            embedding_scale: see `embedding_scaled`.
            scaled_positions: see `embedding_scaled`.

        Raises:
            OfflineError: `choice` is of another seed.
        """
        if self._drawn is None or self._drawn[0] != choice:
            self._drawn = None
            self._drawn = (choice, self._draw(choice))
        model = self._loaded.model
        with norms_as(model, norms) as changed, embedding_scaled(model, embedding_scale, positions=scaled_positions):
            sums = self._recorder.measure(self._ids).sums.cpu()
        layout = self._recorder.layout
        found = Snapshot.from_sums(
            sums, num_states=layout.num_states, step=0, stream=self._recorder.stream.name, overhead_ms=0.0
        )
        choices = {
            "protocol": "random_ids",
            "states": "residual",
            "norms": norms,
            "norms_changed": changed,
            "embedding_scale": embedding_scale,
            "embedding_scale_of": "tokens and positions" if scaled_positions else "tokens",
            "tokens": self._tokens,
            "sequences": self._sequences,
            "parameters": self._drawn[1],
            "blocks": sorted({block.kind for block in self._recorder.stream.blocks}),
            "scan": scan_of(model),
            "float32_products": torch.get_float32_matmul_precision(),
        }
        return RandomStream(
            found.inter_token,
            found.update_inter_token,
            found.norms,
            found.nonfinite,
            self._loaded.describe() | choice.describe() | choices,
        )


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
    """One stream of a `RandomModel`, whose arguments and those of its `stream` these are; `choice` has the seed."""
    model = RandomModel(name, choice.seed, tokens=tokens, sequences=sequences, dtype=dtype, device=device)
    with model:
        return model.stream(choice, norms=norms, embedding_scale=embedding_scale, scaled_positions=scaled_positions)
