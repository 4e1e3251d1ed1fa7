"""Public packages for CKA, through their public interfaces.

Both take models and data loaders, so the stacked states become a model whose layers put them out. Each row of tokens is
one minibatch, over which the packages add HSIC up. They do so in the dtype of the states; float32 copies are made for
them beforehand, outside time and memory.
"""

import contextlib
import io
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import cycle
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

_PAIRED_WORK = 1e13
"""torch_cka multiplies two n×n matrices anew for each pair of states; S²·B·n³ above this takes many seconds."""


class _Layer(nn.Module):
    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state

    def forward(self, row: int) -> Tensor:
        return self.state[row]


class States(nn.Module):
    """A model whose layer l puts out the tokens of state l, one row of the batch after the other."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(_Layer, states))
        self.names = [f"layers.{layer}" for layer in range(len(states))]
        self._rows = cycle(range(states.shape[1]))

    def forward(self, batch: Tensor) -> None:
        """Run every layer; what `batch` holds does not matter."""
        row = next(self._rows)
        for layer in self.layers:
            layer(row)


def peer_calls(states: Tensor) -> dict[str, Callable[[], Tensor]]:
    """CKA `[S, S]` of all rows together by every package that can be imported, by name, version and dtype."""
    found: dict[str, Callable[[], Tensor]] = {}
    num_states, rows, tokens, _ = states.shape
    wide = states.float()
    if package := peer("cka", "pytorch-cka"):
        name = f"pytorch-cka {package.__version__}"
        found[f"{name}, float32"] = _pytorch_cka(package, wide)
        if states.dtype != wide.dtype:
            found[f"{name}, {str(states.dtype).removeprefix('torch.')}"] = _pytorch_cka(package, states)
    if (package := peer("torch_cka", "torch_cka")) and num_states**2 * rows * tokens**3 <= _PAIRED_WORK:
        found[f"torch_cka {package.__version__}, float32"] = _torch_cka(package, wide)
    return found


@cache
def peer(module: str, name: str) -> ModuleType | None:
    """The package, or None and a line about what is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return None


def _minibatches(states: Tensor) -> DataLoader[Any]:
    _, rows, tokens, _ = states.shape
    return DataLoader([(torch.empty(tokens, 0),)] * rows, batch_size=None)  # pyright: ignore[reportArgumentType]


def _pytorch_cka(package: ModuleType, states: Tensor) -> Callable[[], Tensor]:
    # One and the same model on both sides is its fastest way: it then computes each Gram once.
    model, loader = States(states), _minibatches(states)
    return lambda: package.compute_cka(
        model, model, loader, layers=model.names, device=states.device, progress=False
    )[0]  # fmt: skip


def _torch_cka(package: ModuleType, states: Tensor) -> Callable[[], Tensor]:
    models, loader = [States(states), States(states)], _minibatches(states)
    names = models[0].names
    comparison = package.CKA(
        *models, "one", "other", model1_layers=names, model2_layers=names, device=str(states.device)
    )

    def compare() -> Tensor:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            comparison.compare(loader, loader)
        return comparison.export()["CKA"].to(states.device)

    return compare
