"""What the tests of every callback share."""

import torch

from repflow.monitor import Snapshot
from repflow.monitor.sinks import AbstractSink


class Keep(AbstractSink):
    """Keeps the snapshots."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def start(self, run) -> None:
        pass

    def write(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def close(self) -> None:
        pass

    @property
    def steps(self) -> list[int]:
        return [snapshot.step for snapshot in self.snapshots]

    @property
    def tokens(self) -> list[int]:
        return [snapshot.tokens for snapshot in self.snapshots]


def hooks(model: torch.nn.Module) -> list[int]:
    """How many are on each module."""
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
