"""Compiled models on a GPU, under inductor and its CUDA graphs: what is recorded, and what it leaves as it was."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees

from repflow.monitor import Monitor, MonitorConfig
from tests.monitor import toy
from tests.monitor.compiling import compile_model, graphs_and_breaks

DEVICE = torch.device("cuda")
BLOCKS, STEPS, EVERY = 4, 12, 3

MODES: dict[str, dict[str, Any]] = {
    "fullgraph": {},
    "fullgraph, CUDA graphs": {"mode": "reduce-overhead"},
    "each block": {},
    "each block, CUDA graphs": {"mode": "reduce-overhead"},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def build(checkpointing: str | None = None) -> toy.Toy:
    """A model without dropout, whose states can thus be compared with those of an eager forward."""
    torch.manual_seed(0)
    model = toy.Toy(blocks=BLOCKS, width=64, checkpointing=checkpointing).to(DEVICE)
    for block in model.blocks:
        block.dropout.p = 0.0  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model


def batches(tokens: tuple[int, ...]) -> list[Tensor]:
    return [toy.batch(4, tokens[step % len(tokens)], seed=step).to(DEVICE) for step in range(STEPS)]


def train(model: Any, monitor: Monitor | None, ids: list[Tensor]) -> list[Tensor]:
    """Losses of every step; weights stay as they are, so that each step's states can be had again."""
    losses = []
    for step, batch in enumerate(ids):
        torch.compiler.cudagraph_mark_step_begin()
        with monitor.step(step) if monitor is not None else nullcontext():
            loss = toy.loss_of(model, batch)
            loss.backward()
        losses.append(loss.detach().clone())
        model.zero_grad()  # gradients that stay would be added to in memory that a CUDA graph takes again
    return losses


def cuda_graphs() -> int:
    """How many CUDA graphs were made, or begun to be made, since the compiler was reset."""
    manager = cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
    return 0 if manager is None else manager.new_graph_id().id


# PyTorch 2.11 itself fails at checkpointing around blocks that have CUDA graphs each.
WAYS = [
    (style, way)
    for style in MODES
    for way in (None, "default")
    if (style, way) != ("each block, CUDA graphs", "default")
]


@pytest.mark.parametrize(("style", "checkpointing"), WAYS)
def test_sampled_steps_are_recorded_and_the_graphs_stay(style, checkpointing) -> None:
    """Each sampled step its own states, also where a CUDA graph replays what an earlier step did.

    And as many graphs of the compiler, breaks and reasons to leave CUDA graphs out as without the monitor.
    """
    ids = batches((32,) if "CUDA" in style else (32, 32, 48, 40))
    plain = compile_model(build(checkpointing), style.partition(",")[0], **MODES[style])
    bare = train(plain, None, ids)
    graphs, skips = graphs_and_breaks(), counters["inductor"]["cudagraph_skips"]
    bare_cuda_graphs = cuda_graphs() if "CUDA" in style else 0
    torch.compiler.reset()
    counters.clear()

    model = compile_model(build(checkpointing), style.partition(",")[0], **MODES[style])
    monitor = Monitor(model, MonitorConfig(every_n_steps=EVERY))
    seen: list[Tensor] = []
    add = monitor._capture.on_forward

    def keep(forward) -> None:
        seen.append(forward.states.clone())
        add(forward)

    monitor._capture.on_forward = keep
    losses = train(model, monitor, ids)
    monitor.flush()
    skipped = counters["inductor"]["cudagraph_skips"]
    with_monitor = graphs_and_breaks()
    made = cuda_graphs() if "CUDA" in style else 0
    equal = sum(torch.equal(loss, other) for loss, other in zip(losses, bare, strict=True))
    difference = max((loss - other).abs().max().item() for loss, other in zip(losses, bare, strict=True))
    print(
        f"{style}, checkpointing {checkpointing}: graphs and breaks {with_monitor}, without the monitor {graphs}; "
        f"CUDA graphs {made}, without {bare_cuda_graphs}; skips {skipped}, without {skips}; "
        f"{equal} of {STEPS} losses bit-identical, largest difference {difference:.2g}"
    )
    assert monitor.enabled and with_monitor == graphs and graphs[1] == 0 and skipped == skips
    assert (made > 0) == (bare_cuda_graphs > 0)
    torch.testing.assert_close(losses, bare, rtol=1e-6, atol=0)
    assert len(seen) == len(range(0, STEPS, EVERY))
    eager = build()
    own = toy.record_states(eager)
    for step, states in zip(range(0, STEPS, EVERY), seen, strict=True):
        own.clear()
        eager(ids[step])
        torch.testing.assert_close(states, torch.stack(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", ["fullgraph", "fullgraph, CUDA graphs"])
def test_a_disarmed_tap_neither_waits_nor_allocates(style) -> None:
    """Nor does an armed one wait, once its buffer is there."""
    ids = batches((32,))
    model = compile_model(build(), "fullgraph", **MODES[style])
    monitor = Monitor(model, MonitorConfig(every_n_steps=EVERY))
    train(model, monitor, ids)
    monitor.flush()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, monitor, ids[: 2 * EVERY])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert monitor.enabled


def test_mixed_precision_and_evaluation() -> None:
    model = compile_model(build(), "fullgraph")
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    ids = batches((32,))[0]
    with monitor.step(0):
        with torch.no_grad():
            toy.loss_of(model, ids)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                toy.loss_of(model, ids).backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 2 * ids.numel()
