"""Decay and memory length are those of the scan that ran, of the tokens that count, in state-space blocks alone."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repflow.monitor import Monitor, MonitorConfig, RunInfo, Snapshot, open_run, ssm
from repflow.monitor.functional.ssm import LONGEST, QUANTILES, SHORTEST
from repflow.monitor.sinks import RunFileSink
from repflow.monitor.sinks._keys import scalar_items
from repflow.monitor.sum_layout import SumLayout
from tests.monitor.ssm_models import MODELS, Scans, build

EVERY_STEP: dict[str, Any] = dict(every_n_steps=1)
IDS = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))


def right_padding() -> Tensor:
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    mask[2, 2:] = 0
    return mask


def train(model: Any, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    return loss.detach()


def snapshot_of(model, *forwards: tuple[Tensor, Tensor | None], **options) -> Snapshot:
    monitor = Monitor(model, MonitorConfig(**EVERY_STEP | options))
    with monitor.step(0):
        for ids, mask in forwards or ((IDS, None),):
            train(model, ids, mask)
    monitor.flush()
    assert monitor.latest is not None
    return monitor.latest


def assert_quantiles(snapshot: Snapshot, rates: dict[int, Tensor]) -> None:
    """Against numpy on the rates `[N, H]` of every state-space block; its promise is a factor of 9/8 in τ."""
    assert snapshot.ssm_decay is not None and snapshot.ssm_memory is not None
    for block in range(len(snapshot.adjacent)):
        if block not in rates:
            assert snapshot.ssm_decay[block].isnan().all() and snapshot.ssm_memory[block].isnan().all()
            continue
        lengths = (1 / rates[block].numpy()).clip(SHORTEST, LONGEST)
        for measured, values in (
            (-1 / snapshot.ssm_decay[block].log(), lengths.max(1)),
            (snapshot.ssm_memory[block], lengths),
        ):
            truth = np.quantile(values, QUANTILES, method="inverted_cdf")
            np.testing.assert_array_less(np.abs(np.log(measured.numpy() / truth)), np.log(9 / 8) + 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_rates_are_those_of_the_scan(family: str, checkpointing: bool, monkeypatch) -> None:
    """Every kind of mixer, with padding, and once only where checkpointing runs each block again in backward."""
    model: Any = build(family)
    blocks = MODELS[family][1]
    if checkpointing:
        model.gradient_checkpointing_enable()
    scans, read = Scans(model, monkeypatch), []
    count = ssm.count_rates
    monkeypatch.setattr(ssm, "count_rates", lambda rates, valid: (read.extend(rates.double()), count(rates, valid))[1])
    mask = right_padding()
    snapshot = snapshot_of(model, (IDS, mask))
    assert snapshot.ssm_blocks == blocks and len(scans.rates) == len(read) == len(blocks)
    for own, scan in zip(read, scans.rates, strict=True):
        torch.testing.assert_close(own, scan.flatten(0, 1), rtol=2e-5, atol=1e-9)
    valid = {block: scan[mask > 0] for block, scan in zip(blocks, scans.rates, strict=True)}
    assert_quantiles(snapshot, valid)
    part = SumLayout(5, blocks).views(snapshot.sums)
    heads = scans.rates[0].shape[-1]
    assert part["ssm_decay_bins"].sum(-1).tolist() == [21] * len(blocks)
    assert part["ssm_memory_bins"].sum(-1).tolist() == [21 * heads] * len(blocks)
    assert snapshot.ssm_nonfinite is not None and snapshot.ssm_nonfinite.tolist() == [0] * 4


@pytest.mark.parametrize("family", ["Mamba", "Bamba"])
def test_micro_batches_and_sampled_tokens(family: str, monkeypatch) -> None:
    """Two micro-batches are summed; a budget and `skip_first_tokens` choose the tokens that the states have, too."""
    model, blocks = build(family), MODELS[family][1]
    scans, mask = Scans(model, monkeypatch), right_padding()
    long = torch.randint(1, 64, (1, 40))
    monitor = Monitor(model, MonitorConfig(**EVERY_STEP, max_tokens=24, skip_first_tokens=2))
    kept: list[Tensor] = []
    add = monitor._capture.on_forward

    def keep(forward) -> None:
        valid = torch.ones(forward.shape) if forward.mask is None else (forward.mask > 0).float()
        valid[:, :2] = 0
        chosen = torch.zeros(forward.shape)
        chosen[forward.selection.rows if forward.selection.rows is not None else ...] = 1
        if forward.selection.tokens is not None:
            chosen *= torch.zeros(forward.shape[1]).index_fill(0, forward.selection.tokens, 1)
        kept.append((valid * chosen) > 0)
        add(forward)

    monitor._capture.on_forward = keep
    with monitor.step(0):
        train(model, IDS, mask)
        train(model, long)
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == sum(int(chosen.sum()) for chosen in kept)
    each = len(blocks)
    rates = {
        block: torch.cat([scans.rates[row][kept[0]], scans.rates[each + row][kept[1]]])
        for row, block in enumerate(blocks)
    }
    assert_quantiles(monitor.latest, rates)
    counted = SumLayout(5, blocks).views(monitor.latest.sums)["ssm_decay_bins"].sum(-1)
    assert counted.tolist() == [monitor.latest.tokens] * each


@pytest.mark.parametrize("held", [1, 40, 10**6])
def test_a_budget_of_tokens_and_rates_that_are_held(held: int, monkeypatch) -> None:
    """One of three rows is counted, the same in all blocks, however many blocks are counted together."""
    monkeypatch.setattr(ssm, "_HELD_RATES", held)
    model, blocks = build("Mamba"), MODELS["Mamba"][1]
    scans = Scans(model, monkeypatch)
    snapshot = snapshot_of(model, (IDS, right_padding()), ssm_tokens=12)
    counted = SumLayout(5, blocks).views(snapshot.sums)["ssm_decay_bins"].sum(-1)
    (row,) = [row for row, tokens in enumerate((12, 7, 2)) if counted.tolist() == [tokens] * len(blocks)]
    valid = right_padding()[row] > 0
    rates = {block: scan[row][valid] for block, scan in zip(blocks, scans.rates, strict=True)}
    assert_quantiles(snapshot, rates)
    assert snapshot.tokens == 21


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("family", ["Mamba", "Zamba2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_bit_identical(family: str, autocast: bool) -> None:
    def run(monitored: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
        model = build(family)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        monitor = Monitor(model, MonitorConfig(every_n_steps=2)) if monitored else None
        losses = []
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if monitor is None:
                    losses.append(train(model))
                else:
                    with monitor.step(step):
                        losses.append(train(model))
            optimizer.step()
            optimizer.zero_grad()
        if monitor is not None:
            monitor.close()
            assert monitor.latest is not None and monitor.latest.ssm_memory is not None
            assert monitor.latest.ssm_memory.isfinite().all()
        return losses, [parameter.detach() for parameter in model.parameters()], torch.get_rng_state()

    bare, monitored = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(bare[0] + bare[1], monitored[0] + monitored[1], strict=True))
    assert torch.equal(bare[2], monitored[2])


def test_autocast_rounds_as_the_model_does(monkeypatch) -> None:
    """The low-rank product is made in bf16 as in the model; bias and softplus, in float32, round no further."""
    model = build("Mamba")
    scans = Scans(model, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        snapshot = snapshot_of(model)
    assert snapshot.ssm_memory is not None
    lengths = np.quantile(1 / scans.rates[0].numpy(), 0.5, method="inverted_cdf")
    assert abs(np.log(snapshot.ssm_memory[0, 2].item() / lengths)) < np.log(9 / 8) + 2**-7


def test_tokens_that_are_not_finite_are_counted_and_left_out(monkeypatch) -> None:
    model: Any = build("Mamba2")
    scans = Scans(model, monkeypatch)

    def poison(module, args, output):
        output = output.clone()
        output[0, 3, -1] = torch.nan
        output[1, 4, -2] = torch.inf
        return output

    model.backbone.layers[2].mixer.in_proj.register_forward_hook(poison)
    monitor = Monitor(model, MonitorConfig(**EVERY_STEP))
    model.backbone.layers[2].mixer.time_step_limit = (0.2, torch.inf)
    with monitor.step(0):
        train(model)
    monitor.flush()
    snapshot = monitor.latest
    assert snapshot is not None and snapshot.ssm_nonfinite is not None and snapshot.ssm_memory is not None
    assert snapshot.ssm_nonfinite.tolist()[:3] == [0, 0, 2]
    finite = scans.rates[2].flatten(0, 1)
    finite = finite[finite.isfinite().all(-1)]
    measured = snapshot.ssm_memory[2, 2].item()
    truth = np.quantile((1 / finite.numpy()).clip(SHORTEST, LONGEST), 0.5, method="inverted_cdf")
    assert len(finite) == 34 and abs(np.log(measured / truth)) < np.log(9 / 8) + 1e-5


def test_attention_alone_has_none() -> None:
    """No hook, no sum and no value more than without the metric."""
    model = build("Llama")
    with_metric, without = (
        snapshot_of(model),
        snapshot_of(model, metrics=("inter_token", "adjacent", "variation", "cka")),
    )
    assert torch.equal(with_metric.sums, without.sums) and with_metric.sums.numel() == SumLayout(5).size
    assert with_metric.ssm_blocks == () and with_metric.ssm_decay is with_metric.ssm_memory is None
    assert not [key for key in scalar_items(with_metric) if "ssm" in key]
    assert snapshot_of(ssm_model := build("Mamba2"), metrics=("cka",)).ssm_memory is None
    assert not any(module._forward_hooks for module in ssm_model.modules())


def test_what_cannot_be_read_is_said() -> None:
    model = build("Zamba")
    with pytest.warns(RuntimeWarning, match=r"read no Δ on step 0 in 4 of 4 state-space blocks, .*'model.layers.0'"):
        snapshot = snapshot_of(model)
    assert snapshot.ssm_blocks == (0, 1, 2, 3) and snapshot.inter_token.isfinite().all()
    assert snapshot.ssm_memory is not None and snapshot.ssm_memory.isnan().all()


def test_a_failure_ends_this_metric_alone(monkeypatch) -> None:
    def broken(*args):
        raise RuntimeError("planted")

    model = build("Bamba")
    monitor = Monitor(model, MonitorConfig(**EVERY_STEP))
    monkeypatch.setattr(ssm, "count_rates", broken)
    with pytest.warns(RuntimeWarning, match="stopped measuring 'ssm': RuntimeError: planted") as caught:
        for step in range(2):
            with monitor.step(step):
                train(model)
        monitor.close()
    assert len(caught) == 1 and monitor.latest is not None and monitor.latest.step == 1
    assert monitor.latest.inter_token.isfinite().all() and monitor.latest.ssm_memory is not None
    assert monitor.latest.ssm_memory.isnan().all()


@pytest.mark.usefixtures("untyped")
def test_a_projection_that_cannot_be_read_ends_this_metric_alone() -> None:
    class InATuple(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return (super().forward(x),)

    class Mixer(FlatMixer):
        def forward(self, x: Tensor) -> Tensor:
            (projected,) = self.x_proj(x)
            return x + nn.functional.softplus(self.dt_proj(projected[..., :4]))

    model = nn.Sequential(nn.ModuleList([Mixer(fast=False) for _ in range(2)]))
    for mixer in model[0]:  # pyright: ignore[reportGeneralTypeIssues]
        mixer.x_proj = InATuple(16, 4 + 2 * 3, bias=False)
    monitor, x = Monitor(model, MonitorConfig(**EVERY_STEP)), torch.randn(3, 5, 16, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="stopped measuring 'ssm'.*The other metrics go on") as caught:
        for step in range(2):
            with monitor.step(step):
                model[0][1](model[0][0](x)).sum().backward()  # pyright: ignore[reportIndexIssue]
        monitor.close()
    assert len(caught) == 1 and monitor.latest is not None and monitor.latest.step == 1
    assert monitor.latest.inter_token.isfinite().all()


def test_a_forward_that_does_not_end_holds_on_to_nothing() -> None:
    """Neither where the body raises, nor where the monitor fails at its end: what was read is a view of the buffer."""

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    model: Any = build("Mamba")
    monitor = Monitor(model, MonitorConfig(**EVERY_STEP))
    with pytest.raises(torch.OutOfMemoryError, match="planted"), monitor.step(0):
        model.backbone.layers[2].register_forward_pre_hook(fail)
        train(model)
    assert monitor._decays._counts is None
    model = build("Mamba")
    monitor = Monitor(model, MonitorConfig(**EVERY_STEP))
    monitor._capture.on_forward = fail
    with pytest.warns(RuntimeWarning, match="stopped monitoring"), monitor.step(0):
        train(model)
    assert monitor._decays._counts is None


def test_evaluation_and_copies_leave_no_trace() -> None:
    model = build("Mamba")
    monitor = Monitor(model, MonitorConfig(**EVERY_STEP))
    with monitor.step(0):
        model.eval()
        with torch.no_grad():
            model(IDS)
        model.train()
        twin = copy.deepcopy(model)
        train(model)
        train(twin)
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == IDS.numel()
    counted = SumLayout(5, (0, 1, 2, 3)).views(monitor.latest.sums)["ssm_decay_bins"].sum(-1)
    assert counted.tolist() == [IDS.numel()] * 4
    assert not any(module._forward_hooks for module in model.modules())


def test_run_file_windows_and_keys(tmp_path) -> None:
    """Any window is that of its summed counts; an attempt without the metric adds nothing to them."""
    path, model = tmp_path / "run.db", build("Bamba")
    snapshots: list[Snapshot] = []
    first, second = MonitorConfig(**EVERY_STEP, metrics=("adjacent",)), MonitorConfig(**EVERY_STEP)
    for config, steps in ((first, [0]), (second, [1, 2]), (first, [3])):
        monitor = Monitor(model, config, sinks=[RunFileSink(path)], name="run")
        for step in steps:
            with monitor.step(step):
                train(model, torch.randint(1, 64, (2, 9 + step)))
            monitor.flush()
            assert monitor.latest is not None
            snapshots.append(monitor.latest)
        monitor.close()
    run = open_run(path)
    assert run.sizes["quantile"] == len(QUANTILES) and run["quantile"].values.tolist() == list(QUANTILES)
    assert run.ssm_memory.dims == ("step", "transition", "quantile") and run.ssm_nonfinite.dtype == np.int64
    assert np.isnan(run.ssm_memory[[0, 3]]).all()
    for row in (1, 2):
        for name in ("ssm_decay", "ssm_memory", "ssm_nonfinite"):
            np.testing.assert_array_equal(run[name][row], getattr(snapshots[row], name))
    merged = SumLayout(5, (0, 2)).zeros()
    for snapshot in snapshots[1:3]:
        SumLayout(5, (0, 2)).merge_(merged, snapshot.sums)
    whole = Snapshot.from_sums(merged, num_states=5, ssm_blocks=(0, 2), step=2, stream="", overhead_ms=0.0)
    np.testing.assert_array_equal(open_run(path, window=4).ssm_memory[0], whole.ssm_memory)
    assert snapshots[2].ssm_memory is not None
    assert snapshots[2].to_dict()["ssm_memory"][2] == snapshots[2].ssm_memory[2].tolist()
    items = scalar_items(snapshots[2])
    assert [key for key in items if "ssm" in key] == [
        f"repflow/ssm_{name}/transition_0{block}" for name in ("decay", "memory") for block in (0, 2)
    ]
    assert items["repflow/ssm_memory/transition_02"] == snapshots[2].ssm_memory[2, 2].item()


def test_the_description_of_an_older_run_file() -> None:
    run = Monitor(build("Bamba"), MonitorConfig(**EVERY_STEP)).run
    assert run.ssm_blocks == RunInfo.from_json(run.to_json()).ssm_blocks == (0, 2)
    older = json.loads(run.to_json())
    del older["ssm_blocks"]
    assert RunInfo.from_json(json.dumps(older)).layout == SumLayout(5)


class FlatMixer(nn.Module):
    """As in mamba_ssm: x_proj sees a matrix of all tokens, and with its fast path nothing at all."""

    def __init__(self, fast: bool) -> None:
        super().__init__()
        self.x_proj, self.dt_proj = nn.Linear(16, 4 + 2 * 3, bias=False), nn.Linear(4, 16)
        self.A_log, self.fast = nn.Parameter(torch.randn(16, 3)), fast

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        low_rank = (flat @ self.x_proj.weight.T if self.fast else self.x_proj(flat))[:, :4]
        self.delta = nn.functional.softplus(self.dt_proj(low_rank)).detach()
        return x + self.delta.view_as(x)


def test_mixers_of_mamba_ssm_and_their_fast_path() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([FlatMixer(fast=False), FlatMixer(fast=True)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Model(), torch.randn(3, 5, 16, requires_grad=True)
    monitor = Monitor(model, MonitorConfig(**EVERY_STEP))
    with monitor.step(0):
        model(x).sum().backward()
    with pytest.warns(RuntimeWarning, match=r"in 1 of 2 state-space blocks, the first 'blocks.1'.*use_fast_path=False"):
        monitor.flush()
    mixer: Any = model.blocks[0]
    assert monitor.latest is not None
    assert_quantiles(monitor.latest, {0: (mixer.delta * mixer.A_log.exp().amin(1)).double().detach()})
