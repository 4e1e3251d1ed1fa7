"""The engine on a GPU: the same numbers as on the CPU, without waiting, and without a trace in the training run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers

from repflow.monitor import Monitor, MonitorConfig, Snapshot
from repflow.monitor.accumulator import Accumulator
from repflow.monitor.sum_layout import SumLayout
from repflow.triton_kernels import reference
from repflow.triton_kernels._dispatch import force
from tests.gpu.compilations import count_compilations
from tests.monitor import toy

DEVICE = torch.device("cuda")


MASKS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "none": lambda ids: None,
    "bool": lambda ids: right_padding(ids),
    "int": lambda ids: right_padding(ids).long(),
    "documents": lambda ids: packed(ids),
}


@contextmanager
def syncs_are_errors() -> Iterator[None]:
    """Every operation that waits for the device raises inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def snapshot_of(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, **options) -> Snapshot:
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, **options))
    with monitor.step(0):
        toy.loss_of(model, ids, mask).backward()
    monitor.flush()
    assert monitor.latest is not None
    return monitor.latest


def packed(ids: torch.Tensor) -> torch.Tensor:
    """Two documents in each row, and a token of padding."""
    numbers = (torch.arange(ids.shape[1], device=ids.device) * 2 // ids.shape[1] + 1).repeat(len(ids), 1)
    numbers[:, -1] = 0
    return numbers


def right_padding(ids: torch.Tensor) -> torch.Tensor:
    """Row b is padded by b tokens."""
    position = torch.arange(ids.shape[1], device=ids.device)
    return position < ids.shape[1] - torch.arange(len(ids), device=ids.device).unsqueeze(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("budget", [8192, 300])
def test_a_sampled_step_runs_on_the_kernels_alone(budget, dtype, masked, monkeypatch) -> None:
    """And what they say of the captured states is what the reference says, to the tolerances of METRICS.md."""
    model = toy.Toy(blocks=6, width=256).to(DEVICE, dtype)
    ids = toy.batch(4, 200).to(DEVICE)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, max_tokens=budget, cka_tokens=budget // 2))
    add = monitor._capture.on_forward

    def raised(metric, error) -> None:
        raise error

    layout = SumLayout(7)
    expected = Accumulator(monitor.config, layout, 0, DEVICE, raised)

    def both(forward) -> None:
        with force("reference"):
            expected.add(forward, monitor.config.metrics)
        with monkeypatch.context() as patch:
            for name in ("depth_statistics", "token_sums", "hsic_statistics"):
                patch.setattr(reference, name, lambda *args: pytest.fail("the reference ran"))
            add(forward)

    monitor._capture.on_forward = both
    with monitor.step(0):
        toy.loss_of(model, ids, right_padding(ids) if masked else None).backward()
    monitor.flush()
    got = monitor.latest
    assert got is not None and monitor._metrics == monitor.config.metrics
    want = Snapshot.from_sums(expected.flat.cpu(), num_states=7, step=0, stream="", overhead_ms=0)
    assert (got.tokens, got.sequences) == (want.tokens, want.sequences)
    for name in ("inter_token", "update_inter_token", "adjacent", "adjacent_tokens"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=1e-5, equal_nan=True)
    for name in ("norms", "v_loc", "v_glob", "local_variance", "v_loc_rel", "v_glob_rel"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=0)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got.cka, want.cka, rtol=0, atol=tolerance)


def test_nothing_is_compiled_when_lengths_vary() -> None:
    """The first steps meet a long and a short group, with and without a mask; further lengths compile nothing."""
    model = toy.Toy(blocks=4, width=160).to(DEVICE, torch.bfloat16)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))

    def train(step: int, rows: int, tokens: int) -> None:
        for masked in (False, True):
            ids = toy.batch(rows, tokens).to(DEVICE)
            with monitor.step(2 * step + masked):
                toy.loss_of(model, ids, right_padding(ids) if masked else None).backward()

    with count_compilations() as compiled:
        for step, (rows, tokens) in enumerate([(2, 512), (4, 64)]):
            train(step, rows, tokens)
        assert compiled
        compiled.clear()
        for step, (rows, tokens) in enumerate([(2, 511), (3, 300), (1, 1000), (5, 63), (7, 128), (4, 129), (9, 1023)]):
            train(2 + step, rows, tokens)
    assert compiled == []
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.step == 17 and monitor.latest.cka.isfinite().all()


@pytest.mark.parametrize("kind", MASKS)
def test_the_same_bits_every_time(kind) -> None:
    """Of the same states, whatever ran before."""
    model = toy.Toy(blocks=4, width=256).to(DEVICE, torch.bfloat16).train()
    model.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else None)
    ids = toy.batch(4, 700).to(DEVICE)
    snapshots = [snapshot_of(model, ids, MASKS[kind](ids)) for _ in range(3)]
    assert all(torch.equal(snapshots[0].sums, other.sums) for other in snapshots[1:])


@pytest.mark.parametrize("kind", MASKS)
def test_the_same_numbers_as_on_the_cpu(kind) -> None:
    """Float32 states of the two devices differ by rounding, 2⁻²⁴ relative and a few of them over four blocks."""
    model = toy.Toy(blocks=4, width=64)
    model.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, torch.nn.Dropout) else None)
    ids = toy.batch(6, 40)
    mask = MASKS[kind](ids)
    expected = snapshot_of(model, ids, mask)
    model.to(DEVICE)
    got = snapshot_of(model, ids.to(DEVICE), mask.to(DEVICE) if mask is not None else None)
    assert (got.tokens, got.sequences) == (expected.tokens, expected.sequences)
    for name in ("inter_token", "update_inter_token", "adjacent", "norms", "v_loc", "v_glob", "v_loc_rel", "cka"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("budget", [8192, 100])
def test_nothing_waits_on_the_training_path(kind, budget) -> None:
    model = toy.Toy(blocks=4, width=64).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    ids = toy.batch(6, 40).to(DEVICE)
    mask = MASKS[kind](ids)
    monitor = Monitor(model, MonitorConfig(every_n_steps=2, max_tokens=budget, skip_first_tokens=1))
    for step in range(6):
        with syncs_are_errors():
            with monitor.step(step):
                loss = toy.loss_of(model, ids, mask)
                loss.backward()
            monitor.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
            monitor.publish()
    assert monitor.enabled
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.step == 4 and monitor.latest.inter_token.isfinite().all()
    assert monitor.latest.overhead_ms > 0 and monitor.latest.scalars["loss"] > 0


def test_results_are_picked_up_on_a_later_step() -> None:
    model = toy.Toy().to(DEVICE)
    monitor = Monitor(model, MonitorConfig(every_n_steps=4))
    ids = toy.batch().to(DEVICE)
    with monitor.step(0):
        toy.loss_of(model, ids).backward()
    monitor.publish()
    torch.cuda.synchronize()
    with monitor.step(1):
        pass
    assert monitor.latest is not None and monitor.latest.step == 0


def test_more_documents_than_there_is_room_for_are_said() -> None:
    model = toy.Toy().to(DEVICE)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, max_documents=3))
    ids = toy.batch().to(DEVICE)
    with monitor.step(0):
        toy.loss_of(model, ids, packed(ids)).backward()
    with pytest.warns(
        RuntimeWarning, match="left up to 1 documents of a micro-batch out of similarity or CKA on step 0"
    ):
        monitor.flush()
    assert monitor.latest is not None and monitor.latest.sequences == 7 and monitor.latest.tokens == 44


def run(monitored: bool, family: str) -> tuple[list[float], torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    options: dict[str, Any] = dict(
        vocab_size=64, hidden_size=64, num_hidden_layers=4, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    if family == "GPTNeoX":
        config = transformers.GPTNeoXConfig(
            num_attention_heads=4, intermediate_size=96, hidden_dropout=0.1, attention_dropout=0.1, **options
        )
        model = transformers.GPTNeoXForCausalLM(config)
    else:
        config = transformers.Mamba2Config(
            num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=16, **options
        )
        model = transformers.Mamba2ForCausalLM(config)
    torch.nn.Module.to(model, DEVICE, torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    monitor = Monitor(model, MonitorConfig(every_n_steps=2, max_tokens=70)) if monitored else None
    losses = []
    for step in range(6):
        ids = torch.randint(0, 64, (4, 32), device=DEVICE)
        if monitor is None:
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
        else:
            with monitor.step(step):
                losses.append(model(input_ids=ids, labels=ids).loss)
                losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    if monitor is not None:
        monitor.close()
        assert monitor.latest is not None and monitor.latest.cka.isfinite().all()
    return [loss.item() for loss in losses], torch.cuda.get_rng_state(), [p.detach() for p in model.parameters()]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("family", ["GPTNeoX", "Mamba2"])
def test_training_is_bit_identical(family) -> None:
    bare, again, watched = run(False, family), run(False, family), run(True, family)
    for other in (again, watched):
        assert other[0] == bare[0] and torch.equal(other[1], bare[1])
        assert all(torch.equal(a, b) for a, b in zip(bare[2], other[2], strict=True))


def test_memory_is_the_buffer_and_little_more() -> None:
    """Beyond the buffer: what HSIC may take (0.25 GB), and the maps over tokens."""
    model = toy.Toy(blocks=12, width=1024).to(DEVICE)
    ids = toy.batch(4, 1024).to(DEVICE)
    toy.loss_of(model, ids).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    toy.loss_of(model, ids).backward()
    bare = torch.cuda.max_memory_allocated()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    torch.cuda.reset_peak_memory_stats()
    with monitor.step(0):
        toy.loss_of(model, ids).backward()
    monitor.flush()
    buffer = 13 * 4 * 1024 * 1024 * 4
    extra = torch.cuda.max_memory_allocated() - bare
    assert extra < buffer + 0.25e9 + 16 * 2**20, extra / 2**20
    monitor.close()
    assert torch.cuda.memory_allocated() <= bare


def test_out_of_memory_is_the_monitors_own_trouble() -> None:
    model = toy.Toy(blocks=4, width=1024).to(DEVICE)
    ids = toy.batch(8, 1024).to(DEVICE)
    toy.loss_of(model, ids).backward()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    torch.cuda.empty_cache()
    held = [torch.empty(torch.cuda.mem_get_info()[0] - 96 * 2**20, dtype=torch.uint8, device=DEVICE)]
    # Inside the first block, after the monitor has asked for its 160 MiB, there is memory again.
    model.blocks[0].linear.register_forward_pre_hook(lambda *args: held.clear())  # pyright: ignore
    with pytest.warns(RuntimeWarning, match="stopped monitoring at step 0: OutOfMemoryError"), monitor.step(0):
        loss = toy.loss_of(model, ids)
        loss.backward()
    assert loss.isfinite() and not monitor.enabled
