"""Runs and snapshots made of random sums, the same in every process: a snapshot follows from its step."""

import torch

from repflow.monitor.alert import Alert
from repflow.monitor.snapshot import BlockInfo, RunInfo, Snapshot
from repflow.monitor.sum_layout import SumLayout


def make_run(num_states: int = 6, *, name: str = "run", **changes) -> RunInfo:
    kinds = ("ssm", "attention")
    blocks = (BlockInfo(index=i, name=f"layers.{i}", kind=kinds[i % 2]) for i in range(num_states - 1))
    values = {
        "name": name,
        "stream": "residual",
        "blocks": tuple(blocks),
        "model_class": "Tiny",
        "parameters": 1234,
        "config": {"cka_estimator": "unbiased", "states": "residual", "every_n_steps": 50},
        "versions": {"torch": torch.__version__},
    }
    return RunInfo(**(values | changes))


def make_sums(step: int, num_states: int = 6) -> torch.Tensor:
    """Random sums: whole numbers of tokens, and an HSIC matrix that is one."""
    generator = torch.Generator().manual_seed(step)
    layout = SumLayout(num_states)
    sums = torch.randint(1, 1000, (layout.size,), generator=generator).double()
    sums += torch.rand(layout.size, generator=generator, dtype=torch.float64)
    part = layout.views(sums)
    factors = torch.rand(num_states, 30, generator=generator, dtype=torch.float64)
    part["hsic"].copy_(factors @ factors.T)
    for name in ("tokens", "sequences", "nonfinite", "zero"):
        part[name].floor_()
    for name in ("inter_token", "update_inter_token", "adjacent"):
        count = part[f"{name}_groups" if f"{name}_groups" in part else f"{name}_count"]
        part[name].copy_(count * torch.rand(count.shape, generator=generator, dtype=torch.float64))
    return sums


def make_snapshot(step: int, num_states: int = 6, **changes) -> Snapshot:
    values = {"overhead_ms": step + 0.5, "scalars": {"loss": 1.0 / (step + 1)}} | changes
    sums = values.pop("sums", make_sums(step, num_states))
    return Snapshot.from_sums(sums, num_states=num_states, step=step, stream="residual", **values)


def make_alert(step: int, **changes) -> Alert:
    values = {
        "step": step,
        "signature": "nonfinite",
        "severity": "error",
        "title": "Values are not finite",
        "message": "3 tokens at state 2 – “layers.1”",
        "suggestion": "Go back",
        "states": (2, 3),
        "value": 3.0,
        "threshold": 0.0,
    }
    return Alert(**(values | changes))
