"""A fixed probe batch: the same tokens every time, drift, and a training run that cannot tell."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repflow.monitor import Monitor, MonitorConfig, RepflowWarning, Snapshot, open_run
from repflow.monitor.probe import undisturbed
from repflow.monitor.sinks import RunFileSink
from repflow.monitor.sinks._keys import scalar_items
from repflow.monitor.snapshot import RunInfo
from repflow.monitor.sum_layout import SumLayout
from tests.monitor import toy
from tests.monitor.test_monitor import ListSink

EVERY = MonitorConfig(every_n_steps=1)
# Tests that take `untyped` compare random states: the run-time check of annotations draws from Python's `random`.


class Restless(toy.Toy):
    """Has what a forward may change: running statistics, a counter, a buffer that grows, and draws of every kind."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__(blocks)
        self.batch_norm = nn.BatchNorm1d(16)
        self.longest = 0
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("positions", torch.zeros(0))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        if ids.shape[1] > self.longest:  # as rotary embeddings of dynamic length do
            self.longest = ids.shape[1]
            self.positions = torch.rand(ids.shape[1])
        logits = super().forward(ids, attention_mask)
        logits = logits + self.head(self.batch_norm(self.embed(ids).flatten(0, 1))).view_as(logits)
        return logits + self.positions[: ids.shape[1], None] + random.random() + np.random.rand()


def train(
    probe: Any, *, model: nn.Module | None = None, steps: int = 5, autocast: bool = False, **options: Any
) -> tuple[nn.Module, list[float], list[Snapshot]]:
    """Train, with a monitor if there is a probe: the model, its losses and the snapshots."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model, sink, losses = model or Restless(), ListSink(), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = None if probe is None else Monitor(model, EVERY, sinks=[sink], probe_batch=probe, **options)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if monitor is None:
                loss = toy.loss_of(model, toy.batch(seed=step))
            else:
                with monitor.step(step):
                    loss = toy.loss_of(model, toy.batch(seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if monitor is not None:
        monitor.close()
    return model, losses, sink.snapshots


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_training_is_the_same_to_the_bit(autocast: bool, untyped: None) -> None:
    """Dropout, BatchNorm, growing buffers, random states; and autocast, whose cache would hold weights without grad."""
    plain, expected, _ = train(None, autocast=autocast)
    model, losses, snapshots = train(toy.batch(2, 20, seed=9), autocast=autocast)
    assert losses == expected and len(snapshots) == 5
    for (name, value), other in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert plain.longest == model.longest == 12


def test_everything_is_put_back(untyped: None) -> None:
    """Modes of a model of which some parts are frozen in evaluation mode, buffers, gradients, versions, generators."""
    model = Restless()
    model.train()
    model.blocks[1].eval()
    toy.loss_of(model, toy.batch()).backward()

    def state() -> list[Any]:
        tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
        return [
            [module.training for module in model.modules()],
            [(id(tensor), tensor._version) for tensor in tensors],
            [(id(buffer), buffer.tolist()) for buffer in model.buffers()],
            (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
            (torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), model.longest),
        ]

    before = state()
    with undisturbed(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        assert not torch.is_autocast_cache_enabled()
        model(toy.batch(2, 30))
        model.left_over = torch.rand(1)
    assert state() == before and not hasattr(model, "left_over")
    with pytest.raises(KeyboardInterrupt), undisturbed(model):
        model(toy.batch(2, 30))
        raise KeyboardInterrupt
    assert state() == before


def test_the_same_tokens_every_time() -> None:
    """Values hang on the weights alone: of the training batches, and of the step, they know nothing."""
    ids = toy.batch(6, 40, seed=9)
    model, sink = toy.Toy(), ListSink()
    own = toy.record_states(model)
    config = MonitorConfig(every_n_steps=1, max_tokens=64, cka_tokens=30)
    monitor = Monitor(model, config, sinks=[sink], probe_batch={"ids": ids, "attention_mask": ids > 3})
    ids.zero_()  # a copy was not made yet: the first measurement makes it
    ids.copy_(toy.batch(6, 40, seed=9))
    for step in range(4):
        with monitor.step(step):
            toy.loss_of(model, toy.batch(seed=step)).backward()
            ids.zero_()
        with monitor.step(step):  # a second micro-batch measures nothing more
            toy.loss_of(model, toy.batch(seed=step + 10)).backward()
    monitor.close()
    assert len(sink.snapshots) == 4 and len(own) == 4 * 3 * 4  # one probe and two training forwards of four states
    assert monitor.run.probe and all(snapshot.probe for snapshot in sink.snapshots)
    first, *others = sink.snapshots
    assert 0 < first.tokens <= 64
    for other in others:
        assert torch.equal(first.inter_token, other.inter_token) and torch.equal(first.cka, other.cka)
        torch.testing.assert_close(other.drift_first, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
        assert other.to_dict()["drift_first"] == other.to_dict()["drift_previous"]
    assert first.drift_previous is not None and first.drift_previous.isnan().all()


def unbiased_hsic(a: Tensor, b: Tensor) -> Tensor:
    """Song et al. 2012, equation 5, as it stands there, on Grams with a zero diagonal."""
    n, one = len(a), torch.ones(len(a), dtype=torch.float64)
    k, m = (x @ x.T for x in (a - a.mean(0), b - b.mean(0)))
    k, m = k - k.diag().diag(), m - m.diag().diag()
    total = (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_drift_is_cka_with_earlier_states() -> None:
    """Against float64 and the textbook's formula, on states that hooks of the test have seen."""
    ids, model = toy.batch(3, 20, seed=9), toy.Toy()
    seen: list[list[Tensor]] = []
    own = toy.record_states(model)

    def probe_states() -> None:
        with torch.no_grad():
            model.eval()
            own.clear()
            model(ids)
            model.train()
        seen.append([state.double() for state in own])

    optimizer, sink = torch.optim.AdamW(model.parameters(), 5e-2), ListSink()
    monitor = Monitor(model, EVERY, sinks=[sink], probe_batch=lambda: (ids,))
    for step in range(3):
        probe_states()
        with monitor.step(step):
            toy.loss_of(model, toy.batch(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()

    def expected(now: list[Tensor], before: list[Tensor]) -> Tensor:
        values = []
        for a, b in zip(now, before, strict=True):
            cross, left, right = (sum(map(unbiased_hsic, x, y)) for x, y in ((a, b), (a, a), (b, b)))
            values.append(cross / (left * right) ** 0.5)
        return torch.stack(values)

    for step, snapshot in enumerate(sink.snapshots):
        assert snapshot.drift_first is not None and snapshot.drift_previous is not None
        torch.testing.assert_close(snapshot.drift_first, expected(seen[step], seen[0]), rtol=0, atol=1e-5)
        if step:
            torch.testing.assert_close(snapshot.drift_previous, expected(seen[step], seen[step - 1]), rtol=0, atol=1e-5)
    last = sink.snapshots[-1].to_dict()
    assert max(last["drift_first"]) < 0.998 and max(last["drift_previous"]) < 0.9995
    assert last["drift_first"] != last["drift_previous"]


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (torch.full((2, 8), 99), "IndexError"),
        ({"tokens": torch.zeros(2, 8, dtype=torch.long)}, "TypeError"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: "text", "expected probe_batch as the arguments"),
    ],
    ids=["token", "argument", "function", "type"],
)
def test_a_probe_that_raises_ends_monitoring_and_not_training(probe: Any, message: str, untyped: None) -> None:
    _, expected, _ = train(None)
    with pytest.warns(RepflowWarning) as caught:
        model, losses, snapshots = train(probe)
    (warning,) = caught
    assert "the forward of probe_batch raised" in str(warning.message) and message in str(warning.message)
    assert losses == expected and not snapshots and all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("passes", "reason"), [(0, "did so 0 times"), (2, "did so 2 times")], ids=str)
def test_a_forward_that_does_not_run_the_blocks_once_is_told(passes: int, reason: str) -> None:
    class Odd(toy.Toy):
        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            for _ in range(passes - 1 if not self.training else 0):
                super().forward(ids)
            return super().forward(ids) if self.training or passes else self.head(self.embed(ids))

    with pytest.warns(
        RepflowWarning, match=f"the forward of probe_batch to run all blocks once, but .*{reason}"
    ) as told:
        _, losses, snapshots = train(toy.batch(), model=Odd())
    assert len(told) == 1 and len(losses) == 5 and not snapshots


def test_what_it_cannot_run_is_refused() -> None:
    compiled = toy.Toy()
    compiled.compile(backend="eager")
    lazy = toy.Toy()
    lazy.head = nn.LazyLinear(32)
    with pytest.raises(ValueError, match="compiled again"):
        Monitor(compiled, EVERY, probe_batch=toy.batch())
    with pytest.raises(ValueError, match="compiled again"):
        Monitor(toy.Toy(), MonitorConfig(compiled=True), probe_batch=toy.batch())
    with pytest.raises(ValueError, match="without a shape"):
        Monitor(lazy, EVERY, probe_batch=toy.batch())
    sharded = toy.Toy()
    vars(sharded.head.weight)["ds_id"] = 0  # as DeepSpeed marks what it has partitioned
    with pytest.raises(ValueError, match="sharded over ranks"):
        Monitor(sharded, EVERY, probe_batch=toy.batch())


@pytest.mark.parametrize("wrong", [3, "tokens"], ids=str)
def test_what_is_no_batch_is_refused(wrong: Any, untyped: None) -> None:
    with pytest.raises(TypeError, match="expected probe_batch as the arguments of the model's forward"):
        Monitor(toy.Toy(), EVERY, probe_batch=wrong)


def test_run_file_and_loggers_have_it(tmp_path) -> None:
    """Also where an attempt without a probe batch comes before."""
    path = tmp_path / "run.db"
    model = toy.Toy()
    for steps, probe in ((range(2), None), (range(2, 6), toy.batch(seed=9))):
        optimizer, sink = torch.optim.AdamW(model.parameters(), 1e-2), ListSink()
        monitor = Monitor(model, EVERY, sinks=[RunFileSink(path), sink], probe_batch=probe, name="run")
        for step in steps:
            with monitor.step(step):
                toy.loss_of(model, toy.batch(seed=step)).backward()
            optimizer.step()
        monitor.close()
        keys = scalar_items(sink.snapshots[-1])
        assert ("repflow/drift_first/state_00" in keys) is (probe is not None)
    with open_run(path) as run, open_run(path, window=2) as windows:
        assert run.drift_first.dims == ("step", "state") and run.attrs["measured"] == "probe batch"
        assert run.drift_first[:2].isnull().all() and run.drift_previous[2].isnull().all()
        for row, snapshot in enumerate(sink.snapshots, start=2):
            assert run.drift_first[row].values.tolist() == snapshot.to_dict()["drift_first"]
        previous = sink.snapshots[-1].to_dict()["drift_previous"]
        assert run.drift_previous[5].values.tolist() == previous
        assert keys["repflow/drift_previous/state_03"] == previous[3]
        assert windows.drift_first.notnull().all(axis=1).values.tolist() == [False, True, True]
    with open_run(path, attempt=1) as run:
        assert "drift_first" not in run and run.attrs["measured"] == "training batches"
    info = RunInfo.from_json(monitor.run.to_json())
    assert info.layout == SumLayout(4, (), probe=True) != SumLayout(4)
    with_probe, without = (SumLayout(4, (), flag).size for flag in (True, False))
    assert with_probe - without == 4 * 9


def test_drift_begins_again_with_the_run() -> None:
    """A second monitor, as of a resumed run, has none of the states of the first."""
    model, _, first = train(toy.batch(seed=9), model=toy.Toy())
    _, _, second = train(toy.batch(seed=9), model=model)
    assert min(first[-1].to_dict()["drift_first"]) < 1 - 1e-4
    torch.testing.assert_close(second[0].drift_first, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_without_cka_there_is_no_drift() -> None:
    sink, model = ListSink(), toy.Toy()
    monitor = Monitor(model, MonitorConfig(metrics=("adjacent",)), sinks=[sink], probe_batch=toy.batch())
    with monitor.step(0):
        pass
    monitor.close()
    assert (
        all(map(math.isnan, sink.snapshots[0].to_dict()["drift_first"])) and sink.snapshots[0].adjacent.isfinite().all()
    )


def test_the_memory_is_given_back() -> None:
    model = toy.Toy()
    monitor = Monitor(model, EVERY, probe_batch=toy.batch())
    with monitor.step(0):
        pass
    assert monitor._probe is not None and monitor._probe.drift._first is not None
    monitor.close()
    assert monitor._probe._batch is None and monitor._probe.drift._first is None
