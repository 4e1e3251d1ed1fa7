"""Each block must take what the one before it returned: held against the first forward that is recorded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from repflow.monitor import Monitor, MonitorConfig, find_residual_stream
from tests import handwritten
from tests.monitor import toy


class Between(nn.Module):
    """Does something to the stream between its blocks."""

    def __init__(self, between: Callable[[int, Tensor], Tensor], rounds: int = 1, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([toy.Block(16) for _ in range(blocks)])
        self.between, self.rounds = between, rounds

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(self.rounds):
            for index, block in enumerate(self.blocks):
                x = block(self.between(index, x))
        return x


def follow_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in list(model.get_submodule("blocks").children())[1:])


def run(model: nn.Module, monitor: Monitor, steps: int = 3) -> None:
    for step in range(steps):
        with monitor.step(step):
            model(toy.batch(seed=step)).sum().backward()
    monitor.flush()


HARMLESS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "nothing": lambda index, x: x,
    "a copy": lambda index, x: x.clone(),
    "a cast": lambda index, x: x.double(),
    "a view": lambda index, x: x.view(-1, *x.shape[1:]),
    "NaN": lambda index, x: x.clone() * float("nan"),
}


@pytest.mark.parametrize("between", [*HARMLESS])
def test_what_leaves_the_values_alone_is_a_chain(between: str) -> None:
    """Verified once: on later steps there is nothing more on the model."""
    model = Between(HARMLESS[between]).double() if between == "a cast" else Between(HARMLESS[between])
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        assert follow_hooks(model) == 2
        model(toy.batch()).sum().backward()
    with monitor.step(1):
        assert follow_hooks(model) == 0
        model(toy.batch()).sum().backward()
    monitor.flush()
    assert monitor.enabled and monitor.latest is not None and monitor.latest.step == 1


def change_in_place(index: int, x: Tensor) -> Tensor:
    return x.add_(1) if index == 2 else x


BREAKS: dict[str, tuple[Callable[[int, Tensor], Tensor], str]] = {
    "a sum": (lambda index, x: x + 1 if index == 2 else x, r"got other values in float32 \[4, 12, 16\]"),
    "a sum in place": (change_in_place, r"got other values in float32 \[4, 12, 16\]"),
    "fewer tokens": (lambda index, x: x[:, 1:] if index == 2 else x, r"got float32 \[4, 11, 16\]"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_chain_is_said_once_and_left_out(name: str) -> None:
    """The message names both blocks and what was expected; training is not touched."""
    between, got = BREAKS[name]

    def losses(every: int) -> tuple[list[float], Monitor]:
        torch.manual_seed(0)
        model = Between(between)
        monitor = Monitor(model, MonitorConfig(every_n_steps=every))
        values = []
        for step in range(1, 4):
            with monitor.step(step):
                loss = model(toy.batch(seed=step)).square().mean()
                loss.backward()
            values.append(loss.item())
        monitor.flush()
        return values, monitor

    bare, _ = losses(10**6)
    expected = (
        rf"step 1.*'blocks\.2' did not take what 'blocks\.1' returned: expected that float32 \[4, 12, 16\], {got}"
    )
    with pytest.warns(RuntimeWarning, match=expected) as caught:
        watched, monitor = losses(1)
    assert len(caught) == 1 and "Pass blocks=[...]" in str(caught[0].message)
    assert watched == bare
    assert monitor.latest is None and monitor.enabled


def test_a_chain_that_breaks_only_at_times() -> None:
    """As with images among the text: those forwards are left out, the others are measured."""
    model = Between(lambda index, x: x + 1 if index == 2 and torch.is_grad_enabled() and broken else x)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    broken = True
    with pytest.warns(RuntimeWarning, match="left out forwards of step 0") as caught:
        run(model, monitor, steps=1)
    broken = False
    with monitor.step(1):
        model(toy.batch()).sum().backward()
    monitor.flush()
    assert len(caught) == 1
    assert monitor.latest is not None and (monitor.latest.step, monitor.latest.tokens) == (1, 48)


@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_that_run_several_times_in_one_forward(blocks: int) -> None:
    """Each round would pass for a forward of its own."""
    model = Between(lambda index, x: x, rounds=2, blocks=blocks)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    message = (
        rf"expected 'blocks\.0' to begin a forward, and it took what 'blocks\.{blocks - 1}' had returned.*pass blocks"
    )
    with pytest.warns(RuntimeWarning, match=message):
        run(model, monitor)
    assert monitor.latest is None and not monitor.enabled

    monitor = Monitor(model, MonitorConfig(every_n_steps=1), blocks=[*model.blocks] * 2)
    run(model, monitor)
    assert monitor.latest is not None and len(monitor.latest.norms) == 2 * blocks + 1


def test_a_list_that_holds_a_block_more_than_once() -> None:
    model = Between(lambda index, x: x)
    model.blocks = nn.ModuleList([model.blocks[0], model.blocks[1], model.blocks[0]])
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    run(model, monitor)
    assert monitor.latest is not None and len(monitor.latest.norms) == 4


def test_blocks_that_hand_on_a_tuple() -> None:
    class Pair(toy.Block):
        def forward(self, x: Any) -> Any:
            x, seen = x if isinstance(x, tuple) else (x, 0)
            return super().forward(x), seen + 1

    model: Any = nn.Module()
    model.blocks = nn.ModuleList([Pair(16) for _ in range(3)])
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        x: Any = torch.randn(2, 5, 16)
        for block in model.blocks:
            x = block(x)
        x[0].sum().backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 10


@pytest.mark.parametrize("parts", [["ssm", "attention"], ["other"]])
def test_blocks_in_the_wrapper_of_activation_checkpointing(parts: list[str]) -> None:
    """Kinds and readers are those of what is wrapped."""
    model: Any = handwritten.Plain(32) if parts == ["other"] else handwritten.MambaLike(parts, 32)
    path = "blocks" if parts == ["other"] else "backbone.layers"
    blocks = model.get_submodule(path)
    bare = find_residual_stream(model)
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    assert [(b.name, b.kind, b.parts, b.reader) for b in monitor.stream.blocks] == [
        (b.name, b.kind, b.parts, b.reader) for b in bare.blocks
    ]
    with monitor.step(0):
        model(toy.batch(), torch.ones(4, 12)).sum().backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 48


def test_nothing_of_the_stream_is_held_after_a_step() -> None:
    model = Between(lambda index, x: x)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    run(model, monitor, steps=1)
    chain: Any = monitor._capture._chain
    assert chain.verified and chain._last is None
