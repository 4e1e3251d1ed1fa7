"""Real training of small language models on real text under a `Monitor` with the default signatures, step by step."""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repflow.monitor import Alert, Monitor, MonitorConfig, Snapshot
from repflow.monitor.demo.models import MODELS
from repflow.monitor.sinks import AbstractSink

BLOCKS, EVERY, HEALTHY_STEPS = 6, 5, 240
ROWS, TOKENS = 4, 32

_TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))
_SIZE = {"hidden_size": 32, "num_hidden_layers": BLOCKS}
_CHANGES: dict[str, dict[str, Any]] = {
    "transformer": {"intermediate_size": 64},
    "ssm": {"num_heads": 2, "head_dim": 32, "state_size": 8},
    "hybrid": {
        "attn_layer_indices": [1, 4, 5],
        "mamba_n_heads": 2,
        "mamba_d_head": 32,
        "mamba_d_state": 8,
        "intermediate_size": 64,
    },
}


def build(family: str) -> nn.Module:
    """A model of the demo, narrower."""
    (model,) = (model for model in MODELS["small"] if model.name == family)
    return replace(model, settings=dict(model.settings) | _SIZE | _CHANGES[family]).build()


def batch(step: int) -> Tensor:
    """Windows of the text; those of a step are always the same."""
    starts = torch.randint(0, len(_TEXT) - TOKENS, (ROWS,), generator=torch.Generator().manual_seed(step))
    return torch.stack([_TEXT[start : start + TOKENS] for start in starts.tolist()])


class Keep(AbstractSink):
    """Keeps every snapshot."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def start(self, run) -> None:
        pass

    def write(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def close(self) -> None:
        pass


@dataclass
class Training:
    """A training run that can be copied, spoilt and continued."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    """`Monitor.state_dict()`, as a checkpoint keeps it."""
    snapshots: list[Snapshot] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, family: str) -> "Training":
        torch.manual_seed(0)
        model = build(family)
        return cls(model, torch.optim.AdamW(model.parameters(), lr=3e-3))

    def copy(self) -> "Training":
        """As it stands, with no snapshots."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return Training(model, optimizer, self.step, copy.deepcopy(self.state))

    def run(self, steps: int, *, plant: Callable[[nn.Module], None] | None = None, **options: Any) -> "Training":
        """Go on for some steps; `plant` spoils the model before the second of the sampled ones."""
        keep = Keep()
        monitor = Monitor(self.model, MonitorConfig(every_n_steps=EVERY, **options), sinks=[keep])
        monitor.load_state_dict(self.state)
        begin = self.step
        for self.step in range(begin, begin + steps):
            if plant is not None and self.step == begin + EVERY:
                plant(self.model)
            ids = batch(self.step)
            with monitor.step(self.step):
                loss = self.model(input_ids=ids, labels=ids).loss
                loss.backward()
            self.losses.append(loss.item())
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step += 1
        monitor.close()
        self.state = monitor.state_dict()
        self.snapshots += keep.snapshots
        return self

    @property
    def alerts(self) -> list[Alert]:
        return [alert for snapshot in self.snapshots for alert in snapshot.alerts]
