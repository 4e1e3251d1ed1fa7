"""Copies of a monitored model leave the monitor behind, and one that is dropped, or runs for long, leaves nothing."""

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from repflow.monitor import Monitor, MonitorConfig, open_run
from repflow.monitor.sinks import RunFileSink
from tests.monitor import toy
from tests.monitor.test_capture import captured, hooks

pytestmark = pytest.mark.usefixtures("untyped")
EVERY_STEP = MonitorConfig(every_n_steps=1)


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is freed inside is freed by its last reference, not when the garbage collector comes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def build(compiled: bool) -> Any:
    torch.manual_seed(0)
    model = toy.Toy()
    if compiled:
        torch.compiler.reset()
        model.compile(backend="eager")
    return model


def train(model: Any, rows: int = 4) -> Tensor:
    loss = toy.loss_of(model, toy.batch(rows))
    loss.backward()
    return loss.detach()


def forbid_repflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "repflow"]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("armed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_copies_of_a_monitored_model(compiled: bool, armed: bool, newly_armed, monkeypatch) -> None:
    """Deep copies, averages and whole saved models train as the original does, unseen; they load without repflow."""
    model = build(compiled)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loss = train(model)
    monitor = Monitor(model, EVERY_STEP)
    seen, file = captured(monitor), io.BytesIO()

    def copies() -> list[Any]:
        torch.save(model, file)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        average.update_parameters(model)
        return [copy.deepcopy(model), average.module, pickle.loads(pickle.dumps(model))]

    made = copies() if not armed else []
    with monitor.step(0):
        made = made or copies()
        with monkeypatch.context() as elsewhere:
            forbid_repflow(elsewhere)
            file.seek(0)
            made.append(torch.load(file, weights_only=False))
        for number, made_copy in enumerate(made):
            assert hooks(made_copy) == 0 or armed or compiled
            with torch.random.fork_rng():
                torch.manual_seed(1)
                assert torch.equal(train(made_copy), loss), number
        train(model, rows=3)
    monitor.flush()
    assert [states.shape[1] for states in seen] == [3]
    assert monitor.latest is not None and monitor.latest.tokens == 36
    again = Monitor(made[0], EVERY_STEP)  # a copy may be monitored, too
    with again.step(0):
        train(made[0])
    again.close()
    assert again.latest is not None and again.latest.tokens == 48
    monitor.close()
    assert hooks(model) == 0 and not newly_armed()


def test_a_model_that_holds_its_monitor() -> None:
    model = build(compiled=False)
    model.monitor = monitor = Monitor(model, EVERY_STEP)
    with monitor.step(0):
        for made_copy in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert made_copy.monitor is None
            train(made_copy)
        train(model, rows=3)
    monitor.close()
    assert monitor.latest is not None and monitor.latest.tokens == 36


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("without_collector")
def test_a_cell_that_is_run_again_and_again(compiled: bool, tmp_path: Path) -> None:
    """It never closes its monitors: each is gone with its memory, hooks and thread when the next takes its name."""
    model, path, gone, monitor = build(compiled), tmp_path / "run.db", [], None
    installed = set()
    for _ in range(4):
        monitor = Monitor(model, EVERY_STEP, sinks=[RunFileSink(path)], name="run")
        for step in range(3):
            with monitor.step(step):
                train(model)
        gone += [weakref.ref(monitor), weakref.ref(monitor._capture), weakref.ref(monitor._capture.buffer)]
        assert monitor.latest is not None and (monitor.latest.step, monitor.latest.tokens) == (1, 48)
        installed.add(hooks(model))
    assert [reference() is None for reference in gone] == [True] * 9 + [False] * 3
    assert len(installed) == 1 and (installed == {0}) == (not compiled)
    assert monitor is not None
    monitor.close()
    with open_run(path) as run:
        assert run.step.values.tolist() == [0, 1, 2] and run.attrs["attempt"] == 4
    assert hooks(model) == 0 and not [thread for thread in threading.enumerate() if "repflow" in thread.name]


def test_a_cell_that_was_interrupted_and_is_run_again() -> None:
    """The traceback, which notebooks keep, holds the monitor of the interrupted cell: it must not go on recording."""
    model, kept = build(compiled=False), []
    for _ in range(3):
        monitor = Monitor(model, EVERY_STEP)
        seen = captured(monitor)
        kept.append((monitor, seen))
        with pytest.raises(KeyboardInterrupt) as interrupt, monitor.step(0):
            train(model)
            raise KeyboardInterrupt
        kept.append(interrupt)
        with monitor.step(1):
            train(model)
        monitor.flush()
        assert len(seen) == 2 and monitor.latest is not None and monitor.latest.tokens == 48
    assert [len(seen) for _, seen in kept[::2]] == [2, 2, 2] and hooks(model) == 0


@pytest.mark.usefixtures("without_collector")
def test_a_dropped_monitor_frees_the_model() -> None:
    model = build(compiled=False)
    monitor = Monitor(model, EVERY_STEP)
    with monitor.step(0):
        train(model)
    monitor.flush()
    gone = [weakref.ref(model), weakref.ref(monitor), *map(weakref.ref, model.parameters())]
    del model, monitor
    assert all(reference() is None for reference in gone)


def living() -> tuple[int, int]:
    """Objects that the collector knows, and tensors among them."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(thing), Tensor) for thing in objects)


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_grows_with_the_steps(compiled: bool, newly_armed) -> None:
    """Batches of changing size, evaluation, and steps that raise, which leave nothing either."""
    model = build(compiled)
    monitor = Monitor(model, MonitorConfig(every_n_steps=2))
    counts, gradients = [], []

    def run(steps: range) -> None:
        for step in steps:
            try:
                with monitor.step(step):
                    train(model, rows=2 + step % 3)
                    model.eval()
                    model(toy.batch())
                    model.train()
                    if step % 10 == 4:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            monitor.log(loss=torch.ones(()))
        monitor.flush()
        gradients.append([parameter.grad for parameter in model.parameters()])
        counts.append((*living(), hooks(model), len(newly_armed()), monitor._capture.buffer.nbytes))

    run(range(20))
    run(range(20, 40))
    run(range(40, 200))
    assert monitor.latest is not None and monitor.latest.step == 198
    (_, *before), (_, *after) = counts[1:]
    assert before == after and counts[2][0] - counts[1][0] < 40  # 160 steps: less than one object in four of them
    assert len(gradients[0]) == len(list(model.parameters())) and all(grad is not None for grad in gradients[0])
