"""Real run files with made-up values."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from repflow.monitor.sinks import RunFileSink
from repflow.monitor.snapshot import BlockInfo, RunInfo, Snapshot
from repflow.monitor.sum_layout import POSITION_BINS, SumLayout

Change = Callable[[Mapping[str, torch.Tensor], int], None]
"""Edits the sums of the snapshot of a number."""


def made_up_sums(layout: SumLayout, progress: float) -> torch.Tensor:
    """Sums of one step over 8 groups of 64 tokens; `progress` 0 … 1 moves every value."""
    num_states = layout.num_states
    flat = layout.zeros()
    part = layout.views(flat)
    tokens, groups = 512, 8
    depth = torch.linspace(0, 1, num_states, dtype=torch.float64)
    part["tokens"].fill_(tokens)
    part["sequences"].fill_(groups)
    part["inter_token"][:] = groups * (0.05 + (0.2 + 0.6 * progress) * depth)
    part["adjacent"][:] = tokens * (0.7 + 0.25 * depth[1:])
    places = torch.linspace(0, 0.1, POSITION_BINS, dtype=torch.float64)
    part["adjacent_tokens"][:] = tokens / POSITION_BINS * (0.7 + 0.2 * depth[1:, None] * progress + places)
    part["update_inter_token"][:] = groups * (0.1 + 0.5 * progress * depth[1:])
    part["ssm_decay_bins"][:, 60:90] = tokens
    part["ssm_memory_bins"][:, 60 : 90 + round(20 * progress)] = tokens
    part["norms"][:] = tokens * (1 + depth * (4 + 30 * progress))
    part["local_variance"][:] = tokens * (0.1 + 0.2 * progress)
    part["global_variance"].fill_(tokens * (0.1 + 10 * progress))
    part["local_variance_relative"].fill_(tokens * 0.1)
    part["global_variance_relative"].fill_(tokens * 0.3)
    if layout.probe:
        # HSIC of now, the first and the last measurement: 1 on the diagonal, so that beside it stands CKA.
        part["drift_hsic"][:] = torch.eye(3, dtype=torch.float64)
        for earlier, pace in ((1, 0.6), (2, 0.1)):
            moved = 1 - pace * progress * depth
            part["drift_hsic"][:, 0, earlier] = part["drift_hsic"][:, earlier, 0] = moved
    part["hsic"][:] = torch.exp(-(depth[:, None] - depth).abs() * (0.5 + 3 * progress))
    part["fourth_moment"].fill_(1.0)
    part["fourth_moment_max"][:] = 0.05 + 0.3 * progress * depth
    for name, count in {"inter_token_groups": groups, "update_inter_token_groups": groups}.items():
        part[name].fill_(count)
    for name in ("adjacent_count", "norms_count", "local_variance_count", "global_variance_count", "relative_count"):
        part[name].fill_(tokens)
    part["adjacent_tokens_count"].fill_(tokens / POSITION_BINS)
    return flat


def make_info(
    name: str = "run",
    kinds: Sequence[str] = ("attention", "mlp", "ssm"),
    *,
    block_name: str = "layers",
    estimator: str = "unbiased",
    ssm_blocks: Sequence[int] = (),
    probe: bool = False,
) -> RunInfo:
    """A made-up run."""
    return RunInfo(
        name=name,
        stream="decoder",
        blocks=tuple(
            BlockInfo(index=index, name=f"{block_name}.{index}", kind=kind) for index, kind in enumerate(kinds)
        ),
        model_class="ModelForCausalLM",
        parameters=1_234_567,
        config={"cka_estimator": estimator, "states": "residual", "skip_first_tokens": 0},
        versions={"repflow": "0.1.0"},
        ssm_blocks=tuple(ssm_blocks),
        probe=probe,
    )


def snapshot(
    info: RunInfo,
    step: int,
    index: int = 0,
    progress: float = 0.5,
    change: Change | None = None,
    scalars: Mapping[str, float] | None = None,
) -> Snapshot:
    """A made-up snapshot of a run."""
    sums = made_up_sums(info.layout, progress)
    if change is not None:
        change(info.layout.views(sums), index)
    return Snapshot.from_sums(
        sums,
        num_states=info.num_states,
        ssm_blocks=info.ssm_blocks,
        probe=info.probe,
        step=step,
        stream=info.stream,
        overhead_ms=20.0,
        scalars=scalars,
    )


def write_run_file(
    folder: Path,
    name: str = "run",
    kinds: Sequence[str] = ("attention", "mlp", "ssm"),
    steps: Sequence[int] = (0, 10, 20),
    *,
    file: str | None = None,
    change: Change | None = None,
    scalars: Callable[[int], Mapping[str, float]] = lambda index: {"loss": 4.0 / (index + 1)},
    **info: Any,
) -> Path:
    """A run file in a folder; `info` as of `make_info`."""
    path = folder / (file or f"{len(list(folder.glob('*.db')))}.db")
    path.parent.mkdir(exist_ok=True)
    run = make_info(name, kinds, **info)
    sink = RunFileSink(path)
    sink.start(run)
    for index, step in enumerate(steps):
        sink.write(snapshot(run, step, index, index / max(len(steps) - 1, 1), change, scalars(index)))
    sink.close()
    return path
