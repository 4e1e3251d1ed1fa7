"""The engine: sums over micro-batches, publishing, and never any harm."""

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from repflow.monitor import (
    AdjacentLayerSimilarity,
    InterTokenSimilarity,
    LayerCKA,
    LayerVariation,
    Monitor,
    MonitorConfig,
    RunInfo,
    Snapshot,
)
from repflow.monitor.functional import layer_local_variance
from repflow.monitor.sinks import AbstractSink, NullSink
from repflow.monitor.sum_layout import SumLayout
from repflow.triton_kernels import depth_statistics, hsic_statistics, pairwise_hsic
from tests.monitor import toy


class ListSink(AbstractSink):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.runs: list[RunInfo] = []
        self.snapshots: list[Snapshot] = []
        self.closed = 0

    def start(self, run: RunInfo) -> None:
        self.runs.append(run)

    def write(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def close(self) -> None:
        self.closed += 1


def test_snapshot_equals_the_metrics_over_all_micro_batches() -> None:
    """Two micro-batches of different length, one padded, one of documents, against the torchmetrics."""
    model = toy.Toy(blocks=4)
    own, sink = toy.record_states(model), ListSink()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1), sinks=[sink])
    padded = torch.ones(4, 12, dtype=torch.long)
    padded[3, 3:] = 0
    packed = torch.tensor([[1] * 9 + [2] * 8 + [0] * 3]).repeat(3, 1)
    metrics = [InterTokenSimilarity(), AdjacentLayerSimilarity(), LayerVariation(), LayerCKA()]
    norms, rel_loc, rel_glob, top, total = [], [], [], torch.zeros(5), torch.zeros(5, dtype=torch.float64)
    for mask, ids in ((padded, toy.batch()), (packed, toy.batch(3, 20))):
        own.clear()
        with monitor.step(7, mask=mask):
            toy.loss_of(model, ids).backward()
        states = torch.stack(own)
        for metric in metrics:
            metric.update(states, mask)
        depth = depth_statistics(states, mask)
        norms.append(depth.norm[:, mask > 0].double())
        rms = states.double().square().mean((0, 3)).sqrt()
        rel_loc.append((depth.curvature.double().mean(0) / rms)[mask > 0])
        rel_glob.append((depth.spread.double() / rms)[mask > 0])
        hsic = hsic_statistics(states, mask)
        enough = hsic.enough("unbiased")
        top = torch.maximum(top, hsic.fourth_moment_max[enough].amax(0))
        total += hsic.fourth_moment[enough].sum(0)
    monitor.flush()
    (snapshot,) = sink.snapshots
    assert (snapshot.step, snapshot.stream, snapshot.tokens, snapshot.sequences) == (7, "blocks", 39 + 51, 4 + 6)
    close = torch.testing.assert_close
    close(snapshot.inter_token, metrics[0].compute())
    close(snapshot.adjacent, metrics[1].compute())
    close(snapshot.v_loc, metrics[2].compute()["v_loc"])
    close(snapshot.v_glob, metrics[2].compute()["v_glob"])
    close(snapshot.cka, metrics[3].compute())
    close(snapshot.norms, torch.cat(norms, 1).mean(1))
    # The relative forms divide float32 maps by a float64 RMS: 2⁻²⁴ each way.
    close(snapshot.v_loc_rel, torch.cat(rel_loc).mean(), rtol=1e-6, atol=0)
    close(snapshot.v_glob_rel, torch.cat(rel_glob).mean(), rtol=1e-6, atol=0)
    close(snapshot.hsic_top_token, top / total)
    close(snapshot.local_variance.mean(), snapshot.v_loc)
    assert snapshot.overhead_ms > 0
    assert sink.runs[0].num_states == 5 and sink.runs[0].blocks[0].name == "blocks.0"


def test_update_similarity_and_positions() -> None:
    model = toy.Toy()
    own = toy.record_states(model)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    mask = torch.ones(2, 128, dtype=torch.bool)
    mask[1, :64] = False
    with monitor.step(0, mask=mask):
        toy.loss_of(model, toy.batch(2, 128)).backward()
    monitor.flush()
    states, snapshot = torch.stack(own).double(), monitor.latest
    assert snapshot is not None
    unit = nn.functional.normalize(states.diff(dim=0), dim=-1)
    expected = []
    for row, valid in enumerate(mask):
        u = unit[:, row, valid]
        cosines = u @ u.mT
        n = int(valid.sum())
        expected.append((cosines.sum((1, 2)) - n) / (n * (n - 1)))
    torch.testing.assert_close(snapshot.update_inter_token, torch.stack(expected).mean(0))
    cosine = nn.functional.cosine_similarity(states[:-1], states[1:], dim=-1)
    # Row 0 has two tokens in each of the 64 bins; row 1, after its padding, has one.
    bins = (cosine[:, 0].view(3, 64, 2).sum(2) + cosine[:, 1, 64:]) / 3
    torch.testing.assert_close(snapshot.adjacent_tokens, bins, rtol=0, atol=1e-6)


def test_skip_first_tokens_leaves_them_out_of_everything() -> None:
    model = toy.Toy()
    own = toy.record_states(model)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, skip_first_tokens=2))
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[0, :4] = 0  # left padding: the first tokens are those behind it
    with monitor.step(0, mask=mask):
        toy.loss_of(model, toy.batch()).backward()
    monitor.flush()
    kept = mask.clone()
    kept[0, 4:6] = 0
    kept[1:, :2] = 0
    metric = LayerCKA()
    metric.update(torch.stack(own), kept)
    assert monitor.latest is not None and monitor.latest.tokens == int(kept.sum())
    torch.testing.assert_close(monitor.latest.cka, metric.compute())
    torch.testing.assert_close(monitor.latest.v_loc, layer_local_variance(torch.stack(own), kept))


def test_cka_budget_takes_whole_sequences() -> None:
    model = toy.Toy()
    own = toy.record_states(model)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, cka_tokens=12))
    with monitor.step(0):
        toy.loss_of(model, toy.batch()).backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 48
    each = pairwise_hsic(torch.stack(own))
    sums = SumLayout(4).views(monitor.latest.sums)["hsic"]
    assert sum(bool(torch.allclose(sums, hsic, rtol=1e-9)) for hsic in each) == 1


def test_chosen_metrics_only() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, metrics=("adjacent",)))
    with monitor.step(0):
        toy.loss_of(model, toy.batch()).backward()
    monitor.flush()
    snapshot = monitor.latest
    assert snapshot is not None
    assert snapshot.adjacent.isfinite().all() and snapshot.norms.isfinite().all()
    for name in ("inter_token", "update_inter_token", "v_loc", "v_glob", "cka", "hsic_top_token", "local_variance"):
        assert getattr(snapshot, name).isnan().all(), name


def test_non_finite_and_zero_tokens_are_counted_and_left_out() -> None:
    class Fault(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([toy.Block(16) for _ in range(3)])
            self.armed = True

        def forward(self, x):
            for index, block in enumerate(self.blocks):
                x = block(x)
                if index == 0:
                    x = x.clone()
            return x

    class Poison(toy.Block):
        def forward(self, x):
            x = super().forward(x).clone()
            x[0, 3] = 0
            x[1, 5, 2] = torch.nan
            x[1, 6, 1] = torch.inf
            return x

    model = Fault()
    model.blocks[1] = Poison(16)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        model(torch.randn(4, 12, 16)).sum().backward()
    monitor.flush()
    snapshot = monitor.latest
    assert snapshot is not None
    assert snapshot.nonfinite.tolist() == [0, 0, 2, 2] and snapshot.zero.tolist() == [0, 0, 1, 0]
    assert SumLayout(4).views(snapshot.sums)["adjacent_count"].tolist() == [48, 45, 45]
    assert snapshot.inter_token.isfinite().all() and snapshot.cka.isfinite().all() and snapshot.v_glob.isfinite()


def test_publishing() -> None:
    """A step is published when another opens, by publish, or by flush; entering again adds to it."""
    model, sink = toy.Toy(), ListSink()
    monitor = Monitor(model, MonitorConfig(every_n_steps=2), sinks=[sink])

    def train(step: int) -> None:
        with monitor.step(step):
            loss = toy.loss_of(model, toy.batch())
            loss.backward()
        monitor.log(loss=loss, number=step)

    train(0)
    train(0)
    assert monitor.latest is None
    train(1)
    assert [(s.step, s.tokens) for s in sink.snapshots] == [(0, 96)] and monitor.latest is sink.snapshots[0]
    assert set(sink.snapshots[0].scalars) == {"loss", "number"} and sink.snapshots[0].scalars["number"] == 0
    train(2)
    monitor.publish()
    assert [s.step for s in sink.snapshots] == [0, 2]
    train(3)
    train(4)
    monitor.flush()
    assert [s.step for s in sink.snapshots] == [0, 2, 4]
    monitor.close()
    monitor.close()
    train(6)
    assert [s.step for s in sink.snapshots] == [0, 2, 4] and sink.closed >= 1


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError)])
@pytest.mark.usefixtures("untyped")
def test_a_step_is_a_number_from_zero(step, error) -> None:
    message = f"expected the number of the optimizer step.* got {step!r}"
    with pytest.raises(error, match=message), Monitor(toy.Toy()).step(step):
        pass


def test_short_sequences_are_said() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.warns(RuntimeWarning, match="expected sequences of at least 2 valid tokens, but none of 4 on step 0"):
        for step in range(2):
            with monitor.step(step):
                toy.loss_of(model, toy.batch(tokens=1)).backward()
        monitor.flush()
    assert monitor.latest is not None and monitor.latest.inter_token.isnan().all()
    assert monitor.latest.adjacent.isfinite().all() and monitor.enabled


def test_snapshot_as_a_dict() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        toy.loss_of(model, toy.batch()).backward()
    monitor.flush()
    assert monitor.latest is not None
    values = monitor.latest.to_dict()
    assert values["inter_token"] == monitor.latest.inter_token.tolist() and values["v_loc"] == float(
        monitor.latest.v_loc
    )
    assert "sums" not in values and len(values["cka"]) == 4


# The run-time check of annotations draws from Python's `random`: it stays off where random states are compared.
bit_identical = pytest.mark.usefixtures("untyped")


def run(monitored: bool, fault=None, model_of=None) -> tuple[list[float], list, list[torch.Tensor]]:
    """Losses, final random states and parameters of a short training run."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = (model_of or toy.Toy)()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    monitor = Monitor(model, MonitorConfig(every_n_steps=2, max_tokens=30)) if monitored else None
    losses = []
    for step in range(6):
        ids = torch.randint(0, 32, (4, 12))
        if monitor is None:
            losses.append(toy.loss_of(model, ids))
            losses[-1].backward()
        else:
            if fault is not None and step == 2:
                fault(monitor)
            with monitor.step(step):
                losses.append(toy.loss_of(model, ids))
                losses[-1].backward()
            monitor.log(loss=losses[-1])
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
    draws = [random.random() for _ in range(8)], np.random.rand(8).tolist()
    states = [torch.get_rng_state(), torch.tensor(draws, dtype=torch.float64)]
    return [loss.item() for loss in losses], states, [p.detach() for p in model.parameters()]


def same(a, b) -> bool:
    return a[0] == b[0] and all(torch.equal(x, y) for part in (1, 2) for x, y in zip(a[part], b[part], strict=True))


def in_place(name: str):
    """Replaces a method of the monitor's parts by one that raises, as a bug there would."""

    def fault(monitor: Monitor) -> None:
        def broken(*args, **kwargs):
            raise RuntimeError(f"planted in {name}")

        owner, _, method = name.rpartition(".")
        target: Any = monitor
        for part in filter(None, owner.split(".")):
            target = getattr(target, part)
        setattr(target, method, broken)

    return fault


@bit_identical
def test_training_is_bit_identical_under_the_monitor() -> None:
    bare = run(monitored=False)
    assert same(bare, run(monitored=False))
    assert same(bare, run(monitored=True))


@bit_identical
@pytest.mark.parametrize(
    "place",
    [
        "_capture.choose",
        "_capture._store",
        "_capture.on_forward",
        "_capture._start",
        "_send",
        "_publication._delivery.receive",
        "_sink.write",
        "_capture.arm",
    ],
)
def test_a_fault_of_the_monitor_changes_nothing_and_warns_once(place) -> None:
    bare = run(monitored=False)
    with pytest.warns(RuntimeWarning, match=f"stopped monitoring.*planted in {place}.*Training goes on") as caught:
        faulty = run(monitored=True, fault=in_place(place))
    assert same(bare, faulty)
    assert len(caught) == 1


@bit_identical
def test_out_of_memory_frees_the_buffer() -> None:
    def fault(monitor: Monitor) -> None:
        def oom(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        setattr(monitor._capture.buffer, "view", oom)  # noqa: B010 (a fault, not an override)

    bare = run(monitored=False)
    with pytest.warns(RuntimeWarning, match="OutOfMemoryError: CUDA out of memory. Training goes on"):
        assert same(bare, run(monitored=True, fault=fault))


def test_a_metric_that_fails_is_dropped_alone(monkeypatch) -> None:
    from repflow.monitor import accumulator

    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(accumulator, "hsic_statistics", broken)
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.warns(
        RuntimeWarning, match="stopped measuring 'cka': RuntimeError: planted. The other metrics go on"
    ) as caught:
        for step in range(3):
            with monitor.step(step):
                toy.loss_of(model, toy.batch()).backward()
        monitor.flush()
    assert len(caught) == 1 and monitor.latest is not None
    assert monitor.latest.cka.isnan().all() and monitor.latest.inter_token.isfinite().all()


def test_similarity_that_fails_takes_nothing_along(monkeypatch) -> None:
    """It comes from the same pass as what is measured along depth, which then is taken alone."""
    from repflow.monitor import accumulator

    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(accumulator, "depth_and_token_sums", broken)
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.warns(RuntimeWarning, match="stopped measuring 'inter_token': RuntimeError: planted") as caught:
        for step in range(2):
            with monitor.step(step):
                toy.loss_of(model, toy.batch()).backward()
        monitor.flush()
    assert len(caught) == 1 and monitor.latest is not None and monitor.latest.inter_token.isnan().all()
    for name in ("adjacent", "norms", "v_loc", "v_glob_rel", "cka"):
        assert getattr(monitor.latest, name).isfinite().all()


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("budget", [8192, 30, 7])
def test_without_a_mask_as_with_one_that_keeps_everything(skip, budget) -> None:
    snapshots = []
    for mask in (None, torch.ones(4, 12, dtype=torch.bool), torch.ones(4, 12, dtype=torch.long)):
        torch.manual_seed(0)
        model = toy.Toy()
        config = MonitorConfig(every_n_steps=1, max_tokens=budget, skip_first_tokens=skip, cka_tokens=12)
        monitor = Monitor(model, config)
        with monitor.step(0):
            toy.loss_of(model, toy.batch(), mask).backward()
        monitor.flush()
        assert monitor.latest is not None
        snapshots.append(monitor.latest)
    assert all(torch.equal(snapshots[0].sums, other.sums) for other in snapshots[1:])
    assert snapshots[0].cka.isfinite().all()


@bit_identical
def test_warnings_turned_into_errors_do_not_reach_the_training_loop(capsys) -> None:
    bare = run(monitored=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(bare, run(monitored=True, fault=in_place("_capture._store")))
    assert "stopped monitoring" in capsys.readouterr().err


def test_a_sink_that_fails_is_dropped_alone() -> None:
    class Broken(ListSink):
        def write(self, snapshot: Snapshot) -> None:
            raise OSError("disk full")

    model, good = toy.Toy(), ListSink()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1), sinks=[Broken(), good])
    with pytest.warns(RuntimeWarning, match="Broken.*disk full") as caught:
        for step in range(3):
            with monitor.step(step):
                toy.loss_of(model, toy.batch()).backward()
        monitor.close()
    assert len(caught) == 1 and [s.step for s in good.snapshots] == [0, 1, 2]


@bit_identical
@pytest.mark.parametrize("family", ["GPTNeoX", "Mamba2"])
def test_real_models_under_autocast_are_bit_identical(family) -> None:
    """bf16 autocast, dropout, and gradient checkpointing of transformers."""

    def model_of() -> nn.Module:
        options: dict[str, Any] = dict(
            vocab_size=32, hidden_size=32, num_hidden_layers=3, bos_token_id=0, eos_token_id=0, pad_token_id=0
        )
        if family == "GPTNeoX":
            config = transformers.GPTNeoXConfig(
                num_attention_heads=4, intermediate_size=48, hidden_dropout=0.1, **options
            )
            model = transformers.GPTNeoXForCausalLM(config)
        else:
            config = transformers.Mamba2Config(
                num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8, **options
            )
            model = transformers.Mamba2ForCausalLM(config)
        model.gradient_checkpointing_enable()
        return Wrapped(model).train()

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids, attention_mask=None):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(input_ids=ids).logits.float()

    bare = run(monitored=False, model_of=model_of)
    assert same(bare, run(monitored=True, model_of=model_of))


def test_sums_merge_by_addition_and_maxima_by_maximum() -> None:
    layout = SumLayout(3)
    a, b = (torch.rand(layout.size, dtype=torch.float64) for _ in range(2))
    merged = a.clone()
    layout.merge_(merged, b)
    parts, of_a, of_b = (layout.views(flat) for flat in (merged, a, b))
    assert set(parts) == set(layout.shapes)
    for name in parts:
        expected = torch.maximum(of_a[name], of_b[name]) if name in layout.MAXIMA else of_a[name] + of_b[name]
        assert torch.equal(parts[name], expected), name
    with pytest.raises(ValueError, match=f"expected vectors of {layout.size} sums for 3 states, got shape"):
        layout.views(a[1:])


def test_run_info_survives_json() -> None:
    info = Monitor(toy.Toy(), name="a </script> ☃").run
    assert RunInfo.from_json(info.to_json()) == RunInfo.from_json(RunInfo.from_json(info.to_json()).to_json())
    assert info.parameters == sum(p.numel() for p in toy.Toy().parameters())
    assert info.versions["torch"] == torch.__version__ and info.model_class == "Toy"


def test_publishing_inside_of_a_step_leaves_it_open() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        toy.loss_of(model, toy.batch()).backward()
        monitor.publish()
        monitor.flush()
        assert monitor.latest is None
        with monitor.step(0):
            toy.loss_of(model, toy.batch()).backward()
        toy.loss_of(model, toy.batch()).backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 3 * 48


def test_a_step_inside_of_another_is_said() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with (
        pytest.warns(RuntimeWarning, match="left out step 1, which began inside of step 0"),
        monitor.step(0),
        monitor.step(1),
    ):
        toy.loss_of(model, toy.batch()).backward()
    monitor.flush()
    assert monitor.latest is not None and (monitor.latest.step, monitor.latest.tokens) == (0, 48)


@pytest.mark.usefixtures("untyped")
def test_what_is_logged_is_checked_and_copied() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    loss = torch.tensor(2.0)
    with monitor.step(0):
        toy.loss_of(model, toy.batch()).backward()
        with pytest.warns(RuntimeWarning, match=r"left out 'loss': expected a number .* a tensor of shape \[3\]"):
            monitor.log(loss=torch.ones(3))
        with pytest.warns(RuntimeWarning, match="left out 'note': expected a number .* got 'text'"):
            monitor.log(note="text", loss=loss)  # pyright: ignore[reportArgumentType]
    loss.mul_(100)
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.scalars == {"loss": 2.0}


@pytest.mark.usefixtures("untyped")
def test_numbers_of_steps_are_plain() -> None:
    model, step = toy.Toy(), torch.tensor(0)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    for _ in range(2):
        with monitor.step(step):  # pyright: ignore[reportArgumentType]
            toy.loss_of(model, toy.batch()).backward()
        step += 1
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.step == 1 and type(monitor.latest.step) is int
    assert monitor.latest.tokens == 48


def test_one_block_has_no_interior_state() -> None:
    model = toy.Toy(blocks=1)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        toy.loss_of(model, toy.batch()).backward()
    monitor.flush()
    assert monitor.latest is not None
    assert monitor.latest.v_loc.isnan() and monitor.latest.v_loc_rel.isnan() and monitor.latest.v_glob_rel.isfinite()


def test_sequences_too_short_for_cka_are_said() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        toy.loss_of(model, toy.batch(tokens=3)).backward()
    with pytest.warns(
        RuntimeWarning, match="at least 4 valid tokens, but none of 4 on step 0 is that long: CKA is NaN"
    ):
        monitor.flush()


def test_many_short_sequences_do_not_outgrow_the_states(monkeypatch) -> None:
    """The sums over rows are taken a few rows at a time: same values, whatever the slices."""
    from repflow.monitor import accumulator

    snapshots = []
    for size in (accumulator._SUM_BYTES, 16 * 4 * 16 * 3):
        monkeypatch.setattr(accumulator, "_SUM_BYTES", size)
        torch.manual_seed(0)
        model = toy.Toy()
        monitor = Monitor(model, MonitorConfig(every_n_steps=1))
        packed = torch.tensor([[1, 1, 1, 2, 2, 2, 2]]).repeat(20, 1)
        with monitor.step(0, mask=packed):
            toy.loss_of(model, toy.batch(20, 7)).backward()
        monitor.flush()
        snapshots.append(monitor.latest)
    torch.testing.assert_close(snapshots[0].inter_token, snapshots[1].inter_token)
    torch.testing.assert_close(snapshots[0].update_inter_token, snapshots[1].update_inter_token)


def test_numbers_that_begin_again_are_said() -> None:
    """As those of batches do in each epoch: a run file would show the last epoch alone."""
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=2))
    with pytest.warns(RuntimeWarning, match="measures step 0 after step 4: expected numbers that grow") as record:
        for _ in range(3):
            for step in (0, 2, 2, 3, 4):
                with monitor.step(step):
                    toy.loss_of(model, toy.batch()).backward()
    assert len(record) == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_that_is_not_entered_is_said(steps: int) -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.warns(RuntimeWarning, match=r"did not begin step 0: expected `with monitor.step\(0\):`") as record:
        for step in range(steps):
            monitor.step(step)
            toy.loss_of(model, toy.batch()).backward()
        monitor.close()
    assert len(record) == 1


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["gpt2"], {}, "expected a model that is a torch.nn.Module, got str; load or build it first"),
        ([toy.Toy(), {"every_n_steps": 3}], {}, r"expected a MonitorConfig, got \{'every_n_steps': 3\}"),
        ([toy.Toy()], {"sinks": NullSink()}, r"expected a list of sinks, got NullSink; write \[NullSink\(\)\]"),
    ],
    ids=["model", "config", "sinks"],
)
def test_wrong_arguments_say_what_came(arguments, options, message) -> None:
    with pytest.raises(TypeError, match=message):
        Monitor(*arguments, **options)
