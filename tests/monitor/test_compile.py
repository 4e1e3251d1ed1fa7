"""Compiled models: sampled steps are recorded out of the compiled graphs, which stay as they are without the monitor."""

import copy
import gc
import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.taps import _ARMED, is_compiled
from tests.monitor import toy
from tests.monitor.compiling import STYLES, compile_model, graphs_and_breaks
from tests.monitor.test_capture import captured, hooks

LENGTHS = (12, 12, 16, 17)
"""Tokens of the batches of four steps: the compiler makes two graphs of them."""

pytestmark = pytest.mark.usefixtures("untyped", "fresh_compiler")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    graphs_and_breaks()
    yield
    torch.compiler.reset()
    assert not _ARMED


def train(model: nn.Module, monitor: Monitor | None = None, seed: int = 0) -> list[float]:
    """Losses of four optimizer steps of two micro-batches each."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for step, tokens in enumerate(LENGTHS):
        ids = toy.batch(tokens=tokens, seed=step)
        with monitor.step(step) if monitor is not None else nullcontext():
            for _ in range(2):
                loss = toy.loss_of(model, ids, torch.ones_like(ids))
                loss.backward()
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def monitored(model: nn.Module, every_n_steps: int = 2, **options: Any) -> tuple[Monitor, list[Tensor]]:
    monitor = Monitor(model, MonitorConfig(every_n_steps=every_n_steps, **options))
    return monitor, captured(monitor)


def run(style: str, checkpointing: str | None = None, *, first: str | None = None, **options: Any):
    """Losses, graphs and breaks, states: of a training run compiled in one of the styles.

    `first`: "monitor" or "compile", whichever is there first; None, no monitor.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    model = toy.Toy(blocks=6, checkpointing=checkpointing)
    monitor, seen = monitored(model, compiled=True) if first == "monitor" else (None, [])
    compiled = compile_model(model, style, **options)
    if first == "compile":
        monitor, seen = monitored(compiled)
    losses = train(compiled, monitor)
    counts = graphs_and_breaks()
    if monitor is not None:
        monitor.flush()
        assert monitor.latest is not None and monitor.latest.tokens == 2 * 4 * LENGTHS[2]
        monitor.close()
        assert hooks(compiled) == 0
    return losses, counts, seen


def eager_states(checkpointing: str | None = None) -> tuple[list[float], list[Tensor]]:
    """Losses of the same run, not compiled, and the states of the sampled steps by hooks of one's own."""
    torch.manual_seed(0)
    model = toy.Toy(blocks=6, checkpointing=checkpointing)
    own = toy.record_states(model)
    losses = train(model)
    forwards = [torch.stack(own[start : start + 7]) for start in range(0, len(own), 7)]
    return losses, [forwards[index] for index in (0, 1, 4, 5)]


@pytest.mark.parametrize("first", ["compile", "monitor"])
@pytest.mark.parametrize("style", STYLES)
def test_sampled_steps_are_recorded_and_the_graphs_stay(style, first) -> None:
    """As many graphs as without the monitor, also for batches of changing length, and the same losses."""
    bare, graphs, _ = run(style, backend="aot_eager")
    losses, monitored_graphs, seen = run(style, backend="aot_eager", first=first)
    assert losses == bare and monitored_graphs == graphs and graphs[1] == 0
    eager, states = eager_states()
    assert losses == eager and len(seen) == len(states)
    assert all(map(torch.equal, seen, states))


@pytest.mark.parametrize("checkpointing", ["default", "reentrant"])
@pytest.mark.parametrize("style", ["fullgraph", "each block"])
def test_activation_checkpointing_is_recorded_once(style, checkpointing) -> None:
    bare, graphs, _ = run(style, checkpointing, backend="aot_eager")
    losses, monitored_graphs, seen = run(style, checkpointing, backend="aot_eager", first="compile")
    _, states = eager_states(checkpointing)
    assert losses == bare and monitored_graphs == graphs
    assert len(seen) == len(states) and all(map(torch.equal, seen, states))


@pytest.mark.parametrize("style", ["fullgraph", "each block"])
def test_inductor(style, tmp_path, monkeypatch) -> None:
    """What the tap reads is what the compiled model computes: it differs from eager by what inductor rounds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    monkeypatch.setattr("torch._inductor.config.fallback_random", True)  # the dropout of eager mode
    bare, graphs, _ = run(style)
    losses, monitored_graphs, seen = run(style, first="compile")
    assert monitored_graphs == graphs and graphs[1] == 0
    torch.testing.assert_close(losses, bare, rtol=1e-6, atol=0)
    _, states = eager_states()
    assert len(seen) == len(states)
    torch.testing.assert_close(seen, states, rtol=0, atol=1e-6)
