"""Real run files with made-up values."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from repflow.monitor.sinks import RunFileSink
from repflow.monitor.snapshot import POSITION_BINS, BlockInfo, RunInfo, Snapshot, SumLayout

WriteRun = Callable[..., Path]


def made_up_sums(num_states: int, progress: float) -> torch.Tensor:
    """Sums of one step over 8 groups of 64 tokens; `progress` 0 … 1 moves every value."""
    layout = SumLayout(num_states)
    flat = layout.zeros()
    part = layout.views(flat)
    tokens, groups = 512, 8
    depth = torch.linspace(0, 1, num_states, dtype=torch.float64)
    part["tokens"].fill_(tokens)
    part["sequences"].fill_(groups)
    part["inter_token"][:] = groups * (0.05 + (0.2 + 0.6 * progress) * depth)
    part["adjacent"][:] = tokens * (0.7 + 0.25 * depth[1:])
    part["adjacent_tokens"][:] = tokens / POSITION_BINS * 0.8
    part["norms"][:] = tokens * (1 + depth * (4 + 30 * progress))
    part["local_variance"][:] = tokens * (0.1 + 0.2 * progress)
    part["global_variance"].fill_(tokens * (0.1 + 10 * progress))
    part["local_variance_relative"].fill_(tokens * 0.1)
    part["global_variance_relative"].fill_(tokens * 0.3)
    part["hsic"][:] = torch.exp(-(depth[:, None] - depth).abs() * (0.5 + 3 * progress))
    part["fourth_moment"].fill_(1.0)
    part["fourth_moment_max"][:] = 0.05 + 0.3 * progress * depth
    for name, count in {"inter_token_groups": groups, "update_inter_token_groups": groups}.items():
        part[name].fill_(count)
    for name in ("adjacent_count", "norms_count", "local_variance_count", "global_variance_count", "relative_count"):
        part[name].fill_(tokens)
    part["adjacent_tokens_count"].fill_(tokens / POSITION_BINS)
    return flat


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes a run file: `write_run(name, kinds, steps)`; `change(parts, index)` edits the sums of a snapshot."""

    def write(
        name: str = "run",
        kinds: Sequence[str] = ("attention", "mlp", "ssm"),
        steps: Sequence[int] = (0, 10, 20),
        *,
        file: str | None = None,
        block_name: str = "layers",
        change: Callable[[Mapping[str, torch.Tensor], int], None] | None = None,
        scalars: Callable[[int], Mapping[str, float]] = lambda index: {"loss": 4.0 / (index + 1)},
        estimator: str = "unbiased",
    ) -> Path:
        path = tmp_path / (file or f"{len(list(tmp_path.glob('*.db')))}.db")
        path.parent.mkdir(exist_ok=True)
        blocks = tuple(
            BlockInfo(index=index, name=f"{block_name}.{index}", kind=kind) for index, kind in enumerate(kinds)
        )
        info = RunInfo(
            name=name,
            stream="decoder",
            blocks=blocks,
            model_class="ModelForCausalLM",
            parameters=1_234_567,
            config={"cka_estimator": estimator, "states": "residual", "skip_first_tokens": 0},
            versions={"repflow": "0.1.0"},
        )
        sink = RunFileSink(path)
        sink.start(info)
        for index, step in enumerate(steps):
            sums = made_up_sums(info.num_states, index / max(len(steps) - 1, 1))
            if change is not None:
                change(SumLayout(info.num_states).views(sums), index)
            sink.write(
                Snapshot.from_sums(
                    sums,
                    num_states=info.num_states,
                    step=step,
                    stream="decoder",
                    overhead_ms=20.0,
                    scalars=scalars(index),
                )
            )
        sink.close()
        return path

    return write
