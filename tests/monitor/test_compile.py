"""Compiled models: sampled steps are recorded from inside of the graphs, which stay as they are without the monitor."""

import copy
import functools
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
from repflow.monitor.taps import is_compiled
from tests.monitor import toy
from tests.monitor.compiling import STYLES, compile_model, graphs_and_breaks
from tests.monitor.test_capture import captured, hooks

LENGTHS = (12, 12, 16, 17)
"""Tokens of the batches of four steps: the compiler makes two graphs of them."""

pytestmark = pytest.mark.usefixtures("untyped", "fresh_compiler")


@pytest.fixture
def fresh_compiler(newly_armed: Callable[[], set[int]]) -> Iterator[None]:
    torch.compiler.reset()
    graphs_and_breaks()
    yield
    torch.compiler.reset()
    assert not newly_armed()


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


BLOCKS = 3


@functools.cache
def bare_run(style: str, checkpointing: str | None = None):
    """Losses, and graphs and breaks, without a monitor."""
    return run(style, checkpointing)[:2]


def run(style: str, checkpointing: str | None = None, *, first: str | None = None):
    """Losses, graphs and breaks, states: of a training run compiled in one of the styles.

    `first`: "monitor" or "compile", whichever is there first; None, no monitor.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    model = toy.Toy(blocks=BLOCKS, checkpointing=checkpointing)
    monitor, seen = monitored(model, compiled=True) if first == "monitor" else (None, [])
    compiled = compile_model(model, style, backend="eager" if style in ("whole", "in place") else "aot_eager")
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


def eager(checkpointing: str | None = None) -> tuple[list[float], list[Tensor]]:
    """Losses of the same run, not compiled, and the states of the sampled steps by hooks of one's own."""
    torch.manual_seed(0)
    model = toy.Toy(blocks=BLOCKS, checkpointing=checkpointing)
    own = toy.record_states(model)
    losses = train(model)
    forwards = forwards_of(own)
    return losses, [forwards[index] for index in (0, 1, 4, 5)]


def forwards_of(own: list[Tensor]) -> list[Tensor]:
    """One tensor for each forward."""
    return [torch.stack(own[start : start + BLOCKS + 1]) for start in range(0, len(own), BLOCKS + 1)]


@pytest.mark.parametrize(
    ("style", "first"),
    [*((style, "compile") for style in STYLES), ("fullgraph", "monitor"), ("each block wrapped", "monitor")],
)
def test_sampled_steps_are_recorded_and_the_graphs_stay(style, first) -> None:
    """As many graphs as without the monitor, also for batches of changing length, and the same losses."""
    bare, graphs = bare_run(style)
    losses, monitored_graphs, seen = run(style, first=first)
    assert losses == bare and monitored_graphs == graphs and graphs[1] == 0
    eager_losses, states = eager()
    assert losses == eager_losses and len(seen) == len(states)
    assert all(map(torch.equal, seen, states))


@pytest.mark.parametrize("checkpointing", ["default", "reentrant"])
@pytest.mark.parametrize("style", ["fullgraph", "each block"])
def test_activation_checkpointing_is_recorded_once(style, checkpointing) -> None:
    bare, graphs = bare_run(style, checkpointing)
    losses, monitored_graphs, seen = run(style, checkpointing, first="compile")
    _, states = eager(checkpointing)
    assert losses == bare and monitored_graphs == graphs
    assert len(seen) == len(states) and all(map(torch.equal, seen, states))


class InPlace(toy.Block):
    """Changes its input, which is the state before it, and its own result."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        return super().forward(x).add_(1.0)


def test_inductor_reads_states_before_they_change_in_place(tmp_path, monkeypatch) -> None:
    """Within what inductor rounds: its kernels are fused up to the tap, and reuse memory behind it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = toy.Toy(blocks=2)
    model.blocks = nn.ModuleList([InPlace(16) for _ in range(2)])
    own, plain = toy.record_states(model), copy.deepcopy(model)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    ids = toy.batch()
    torch.manual_seed(0)
    expected = toy.loss_of(model, ids)
    expected.backward()
    # The dropout of eager mode.
    compiled = compile_model(plain, "fullgraph", options={"fallback_random": True})
    monitor, seen = monitored(compiled)
    torch.manual_seed(0)
    with monitor.step(0):
        loss = toy.loss_of(compiled, ids)
        loss.backward()
    torch.testing.assert_close(seen, [torch.stack(own)], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for got, want in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-6)


def test_only_training_forwards_with_gradients() -> None:
    """And no more graphs than without the monitor where modes change."""

    def forwards(model: Any) -> None:
        for tokens in (12, 12, 14):
            toy.loss_of(model, toy.batch(tokens=tokens)).backward()
            with torch.no_grad():
                toy.loss_of(model, toy.batch(tokens=tokens))
            model.eval()
            toy.loss_of(model, toy.batch(tokens=tokens))
            model.train()

    model = toy.Toy()
    forwards(compile_model(model, "fullgraph", backend="eager"))
    bare = graphs_and_breaks()
    torch.compiler.reset()
    compiled = compile_model(model, "fullgraph", backend="eager")
    monitor, seen = monitored(compiled)
    with monitor.step(0):
        forwards(compiled)
    assert graphs_and_breaks() == bare and len(seen) == 3
    assert monitor._step is not None
    assert monitor._step.ignored == {"forwards without gradients": 3, "forwards in evaluation mode": 3}


def test_a_fault_on_a_sampled_step_leaves_training_alone() -> None:
    torch.manual_seed(0)
    bare = train(compile_model(toy.Toy(), "whole", backend="eager"))
    torch.compiler.reset()
    torch.manual_seed(0)
    compiled = compile_model(toy.Toy(), "whole", backend="eager")
    monitor = Monitor(compiled, MonitorConfig(every_n_steps=2))

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monitor._capture.on_forward = fail
    with pytest.warns(RuntimeWarning, match="stopped monitoring at step 0: ZeroDivisionError") as caught:
        assert train(compiled, monitor) == bare
    assert len(caught) == 1 and not monitor.enabled


def test_states_that_an_operator_cannot_take_are_said() -> None:
    """When the step is sampled, not while the model is compiled: that goes on."""

    class Boxed(nn.Linear):
        def forward(self, box: dict[str, Tensor]) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return {"x": super().forward(box["x"])}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Boxed(8, 8), Boxed(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            box = {"x": x}
            for block in self.blocks:
                box = block(box)
            return box["x"]

    compiled = compile_model(Model(), "fullgraph", backend="eager")
    monitor = Monitor(compiled, MonitorConfig(every_n_steps=1))
    with pytest.warns(RuntimeWarning, match="takes and returns its state as a plain floating tensor"):
        for step in range(2):
            with monitor.step(step):
                compiled(torch.randn(2, 5, 8)).sum().backward()
    assert graphs_and_breaks() == (1, 0)


@pytest.mark.parametrize(
    ("first", "remedy"),
    [("monitor", "make the monitor with compiled=True"), ("run", r"call torch\.compiler\.reset\(\) after making it")],
)
def test_what_the_compiler_cannot_know_of_is_said(first, remedy) -> None:
    """A monitor before `torch.compile`, without saying so, and a monitor after the first run: the remedies work."""
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1)) if first == "monitor" else None
    compiled = compile_model(model, "whole", backend="eager")
    if monitor is None:
        toy.loss_of(compiled, toy.batch()).backward()
        monitor = Monitor(compiled, MonitorConfig(every_n_steps=1))
    with pytest.warns(RuntimeWarning, match=f"recorded nothing on step 0.*{remedy}") as caught:
        for step in range(3):
            with monitor.step(step):
                toy.loss_of(compiled, toy.batch()).backward()
        monitor.flush()
    assert len(caught) == 1 and monitor.latest is None
    torch.compiler.reset()
    if first == "monitor":
        monitor = Monitor(model, MonitorConfig(every_n_steps=1, compiled=True))
    with monitor.step(3):
        toy.loss_of(compiled, toy.batch()).backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.step == 3


@pytest.mark.parametrize("guards", [False, True])
def test_two_compiled_models_of_one_class(guards) -> None:
    """The compiler takes the graph of the one without hooks for both, unless it is told to look at hooks."""
    other, model = (compile_model(toy.Toy(), "in place", backend="eager") for _ in range(2))
    monitor, seen = monitored(model, every_n_steps=1)
    said = nullcontext() if guards else pytest.warns(RuntimeWarning, match="skip_nnmodule_hook_guards = False")
    with said, torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guards):
        for step in range(3):
            toy.loss_of(other, toy.batch()).backward()
            with monitor.step(step):
                toy.loss_of(model, toy.batch()).backward()
        monitor.flush()
    assert len(seen) == (3 if guards else 0)


def test_a_compiled_function_around_the_model() -> None:
    model = toy.Toy()
    monitor, seen = monitored(model, compiled=True)
    loss_of = torch.compile(toy.loss_of, backend="eager", fullgraph=True)
    with monitor.step(0):
        loss_of(model, toy.batch()).backward()
    assert len(seen) == 1


def test_copies_of_a_tapped_model_leave_the_monitor_behind() -> None:
    """EMA copies and checkpoints of whole models, compiled again or not, record nothing and hold nothing."""
    model = toy.Toy()
    compiled = compile_model(model, "fullgraph", backend="eager")
    monitor, seen = monitored(compiled)
    file = io.BytesIO()
    with monitor.step(0):
        toy.loss_of(compiled, toy.batch()).backward()
        torch.save(model, file)
        file.seek(0)
        clones = copy.deepcopy(model), torch.load(file, weights_only=False)
        again = [compile_model(clone, "fullgraph", backend="eager") for clone in clones]
        for clone in (*clones, *again, copy.deepcopy(compiled)):
            toy.loss_of(clone, toy.batch(rows=9)).backward()
    assert len(seen) == 1


def test_a_cell_that_is_run_again() -> None:
    """Monitors may follow each other and run side by side; one that is dropped leaves no hook behind."""
    compiled = compile_model(toy.Toy(), "fullgraph", backend="eager")
    first, seen_first = monitored(compiled)
    installed = hooks(compiled)
    second, seen_second = monitored(compiled)
    for step in range(2):
        with first.step(2 * step), second.step(2 * step):
            toy.loss_of(compiled, toy.batch()).backward()
    assert len(seen_first) == len(seen_second) == 2 and graphs_and_breaks() == (1, 0)
    first.close()
    with second.step(4):
        toy.loss_of(compiled, toy.batch()).backward()
    assert (len(seen_first), len(seen_second)) == (2, 3) and hooks(compiled) == installed
    third, seen_third = monitored(compiled)
    del second
    gc.collect()
    assert hooks(compiled) == installed
    with third.step(0):
        toy.loss_of(compiled, toy.batch()).backward()
    assert len(seen_third) == 1


def test_an_exported_program_has_no_taps() -> None:
    model = toy.Toy().eval()
    Monitor(model, MonitorConfig(compiled=True))
    program = torch.export.export(model, (toy.batch(),))
    assert "repflow" not in str(program.graph)


def test_compiled_models_are_told() -> None:
    assert not is_compiled(toy.Toy())
    for style in STYLES:
        assert is_compiled(compile_model(toy.Toy(), style))
    assert is_compiled(nn.Sequential(compile_model(toy.Toy(), "whole")))


def test_compiled_false_leaves_the_model_alone() -> None:
    compiled = compile_model(toy.Toy(), "fullgraph", backend="eager")
    monitor = Monitor(compiled, MonitorConfig(every_n_steps=2, compiled=False))
    assert hooks(compiled) == 0
    with monitor.step(1):
        toy.loss_of(compiled, toy.batch()).backward()
    assert hooks(compiled) == 0


def test_llama_with_padding_under_autocast() -> None:
    """Masks are read inside of the graph too, and states have the dtype that the model gives them."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model: Any = transformers.LlamaForCausalLM(config).bfloat16().train()
    ids = torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def step(monitor: Monitor, call: Any, number: int) -> None:
        with monitor.step(number), torch.autocast("cpu", torch.bfloat16):
            call(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        monitor.flush()

    plain, expected = monitored(model)
    step(plain, model, 0)
    plain.close()
    loss_of = torch.compile(lambda **batch: model(**batch), backend="aot_eager", fullgraph=True)
    monitor, seen = monitored(model, compiled=True)
    step(monitor, loss_of, 0)
    assert seen[0].dtype == torch.bfloat16 and torch.equal(seen[0], expected[0])
    assert monitor.latest is not None and monitor.latest.tokens == 16


def test_boundaries_of_documents_are_no_business_of_the_graph() -> None:
    """Their number differs from batch to batch: a graph that they entered would be compiled for each."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model: Any = transformers.LlamaForCausalLM(config).train()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    monitor = Monitor(compiled, MonitorConfig(every_n_steps=3))
    graphs_and_breaks()
    for number in range(1, 6):
        lengths = [4] * number + [24 - 4 * number]
        told = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        with monitor.step(number):
            compiled(
                input_ids=torch.arange(24).unsqueeze(0), position_ids=positions, cu_seq_lens_q=told, cu_seq_lens_k=told
            ).logits.sum().backward()
    monitor.flush()
    assert graphs_and_breaks() == (1, 0)
    assert monitor.latest is not None and (monitor.latest.step, monitor.latest.sequences) == (3, 4)
