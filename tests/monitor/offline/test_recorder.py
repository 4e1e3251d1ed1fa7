"""Forwards in evaluation mode are measured as the live monitor measures those of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repflow.monitor import Monitor, MonitorConfig, Snapshot
from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.batching import pad, plan_batches
from repflow.monitor.offline.loading import LoadedModel, load_model
from repflow.monitor.offline.recorder import StateRecorder, _on_their_devices
from repflow.triton_kernels.hsic import Estimator
from tests.monitor.offline import tiny

LENGTHS = (9, 14, 14, 5)
SPREAD = {
    **dict.fromkeys(("embed_in", "rotary_emb", "final_layer_norm", "layers.0"), "cpu"),
    **dict.fromkeys(("layers.1", "layers.2"), "disk"),
}
"""Of a gpt_neox: where its parts lie."""


@pytest.fixture(params=tiny.KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    return load_model(str(tiny.save(tmp_path, request.param)))


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, tiny.VOCABULARY, (length,), generator=draw).int().numpy() for length in lengths]
    return pad(rows)


def value(recorder: StateRecorder, sums: Tensor) -> Snapshot:
    states = recorder.layout.num_states
    return Snapshot.from_sums(sums, num_states=states, step=0, stream=recorder.stream.name, overhead_ms=0.0)


def states_of(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """h^(0..L) by hooks of one's own."""
    seen: list[Tensor] = []
    blocks = [model.get_submodule(block.name) for block in StateRecorder(model).stream.blocks]

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    for block in blocks:
        hooks.append(block.register_forward_hook(keep))
    with torch.no_grad():
        model(ids, attention_mask=None if mask is None else mask.long())
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("lengths", [LENGTHS, (8, 8)], ids=["padded", "even"])
def test_the_sums_are_those_of_the_live_monitor(loaded: LoadedModel, lengths: tuple[int, ...], estimator: Estimator):
    """Bit for bit: the small models have no dropout, so that training changes nothing in a forward."""
    ids, mask = batch(lengths)
    with StateRecorder(loaded.model, cka_estimator=estimator, skip_first_tokens=1) as recorder:
        measured = recorder.measure(ids, mask)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    config = MonitorConfig(
        every_n_steps=1, cka_estimator=estimator, skip_first_tokens=1, metrics=recorder._config.metrics
    )
    live = Monitor(loaded.model.train(), config)
    with live.step(0, mask=torch.ones_like(ids, dtype=torch.bool) if mask is None else mask):
        loaded.model(ids, attention_mask=None if mask is None else mask.long(), use_cache=False)
    live.flush()
    assert live.latest is not None
    assert torch.equal(measured.sums, live.latest.sums)
    assert value(recorder, measured.sums).tokens == sum(lengths) - len(lengths)
    live.close()


def test_features_are_the_states_of_last_tokens(loaded: LoadedModel):
    ids, mask = batch()
    assert mask is not None
    with StateRecorder(loaded.model, features=True) as recorder:
        measured = recorder.measure(ids, mask)
    assert measured.features is not None
    states = states_of(loaded.model, ids, mask)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(measured.features[:, row], states[:, row, length - 1])
        alone = states_of(loaded.model, ids[row : row + 1, :length], None)[:, 0, -1]
        torch.testing.assert_close(measured.features[:, row], alone, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(loaded: LoadedModel):
    ids, mask = batch()
    with StateRecorder(loaded.model) as recorder:
        together = recorder.measure(ids, mask).sums
        alone = recorder.layout.zeros()
        for row, length in enumerate(LENGTHS):
            recorder.layout.merge_(alone, recorder.measure(ids[row : row + 1, :length]).sums)
    one, other = value(recorder, together), value(recorder, alone)
    assert (one.tokens, one.sequences) == (other.tokens, other.sequences) == (sum(LENGTHS), len(LENGTHS))
    for name in ("inter_token", "update_inter_token", "adjacent", "norms", "v_loc", "v_glob", "cka", "adjacent_tokens"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=1e-4, atol=2e-5, equal_nan=True, msg=name
        )


def test_a_batch_in_several_forwards(loaded: LoadedModel):
    ids, mask = batch()
    with StateRecorder(loaded.model, features=True) as recorder:
        whole, parts = recorder.measure(ids, mask), recorder.measure(ids, mask, rows=3)
    torch.testing.assert_close(whole.sums, parts.sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.features, parts.features, rtol=1e-5, atol=1e-5)


def test_states_as_transformers_returns_them(loaded: LoadedModel):
    """`hf`: h^(L) after the final norm. Of Mamba's list h^(0) is missing."""
    ids, _ = batch((8, 8))
    with torch.no_grad():
        returned = loaded.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    with StateRecorder(loaded.model, states="hf", features=True) as recorder:
        features = recorder.measure(ids).features
    with StateRecorder(loaded.model, features=True) as recorder:
        residual = recorder.measure(ids).features
    assert features is not None and residual is not None
    assert (
        torch.equal(features[-len(returned) :], torch.stack(returned)[:, :, -1]) or "mamba" in loaded.config.model_type
    )
    assert torch.equal(features[-1], returned[-1][:, -1])
    assert torch.equal(features[:-1], residual[:-1])
    assert not torch.equal(features[-1], residual[-1])


def test_a_model_spread_over_devices(tmp_path: Path):
    tiny.save(tmp_path, "gpt_neox")
    ids, mask = batch()
    sums = []
    for device_map in (None, SPREAD):
        with StateRecorder(load_model(str(tmp_path), device_map=device_map).model) as recorder:
            sums.append(recorder.measure(ids, mask).sums)
    assert torch.equal(*sums)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which GPU is the current one, of two that are made up: the last two of three blocks lie on the second."""

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        before = now[0]
        now[0] = before if device.index is None else device.index
        try:
            yield
        finally:
            now[0] = before

    def device_of(module: nn.Module) -> torch.device:
        return torch.device("cuda", 1) if getattr(module, "second", False) else torch.device("cpu")

    now = [0]
    monkeypatch.setattr("repflow.monitor.offline.recorder.on_device", on_device)
    monkeypatch.setattr("repflow.monitor.offline.recorder._device_of", device_of)
    return now


def watched(model: Any, current: list[int]) -> list[int]:
    """The GPU that is current in each block, and then in the final norm."""
    seen: list[int] = []
    for block in model.layers[1:]:
        block.second = True
    for module in (*(block.mlp for block in model.layers), model.final_layer_norm):
        module.register_forward_pre_hook(lambda *_: seen.append(current[0]))
    return seen


def test_each_block_runs_on_its_own_gpu(current: list[int], tmp_path: Path):
    """accelerate moves what a block takes, and leaves the current GPU as it is."""
    model = load_model(str(tiny.save(tmp_path, "gpt_neox")), device_map=SPREAD).model
    ids, mask = batch()
    seen, outside = watched(model, current), []
    with StateRecorder(model, on_states=lambda _: outside.append(current[0])) as recorder:
        recorder.measure(ids, mask, rows=2)
    assert seen == [0, 1, 1, 0] * 2 and outside == [0] * 2 and current == [0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_current_gpu_is_put_back_whatever_happens(error: type[BaseException], current: list[int], tmp_path: Path):
    model: Any = load_model(str(tiny.save(tmp_path, "gpt_neox")), device_map=SPREAD).model
    ids, mask = batch()

    def fail(*_: object) -> None:
        assert current == [1]
        raise error

    with StateRecorder(model) as recorder:
        seen = watched(model, current)
        failing = model.layers[1].attention.register_forward_hook(fail)
        with pytest.raises(error):
            recorder.measure(ids, mask)
        assert seen == [0] and current == [0]
        failing.remove()
        recorder.measure(ids, mask)
    assert seen == [0, 0, 1, 1, 0] and current == [0]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.layers)


def test_blocks_on_the_device_of_the_tokens_get_no_more_hooks():
    modules = [nn.Linear(2, 2) for _ in range(3)]
    with _on_their_devices(modules, torch.device("cpu")):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_the_user_sees_what_fails(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    """Unlike in training nothing is swallowed."""
    ids, _ = batch((8, 8))
    monkeypatch.setattr("repflow.monitor.accumulator.hsic_statistics", lambda *_, **__: 1 / 0)
    with StateRecorder(loaded.model) as recorder, pytest.raises(ZeroDivisionError):
        recorder.measure(ids)


class Skipping(nn.Module):
    """Leaves out its second block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCABULARY, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(input_ids))
        return self.blocks[2](x)


def test_what_cannot_be_measured():
    with pytest.raises(OfflineError, match="expected a list of blocks in Linear"):
        StateRecorder(nn.Linear(2, 2))
    with pytest.raises(OfflineError, match='states="hf": expected a norm behind the last block of Skipping'):
        StateRecorder(Skipping(), states="hf")
    ids, _ = batch((8, 8))
    with (
        StateRecorder(Skipping()) as recorder,
        pytest.raises(OfflineError, match=r"expected the blocks of 'blocks' to"),
    ):
        recorder.measure(ids)


def test_batches_hold_samples_of_like_length():
    lengths = [7, 3, 9, 3, 4, 20, 5, 3]
    batches = plan_batches(lengths, 12)
    assert sorted(number for batch in batches for number in batch) == list(range(8))
    assert [list(batch) for batch in batches] == [[1, 3, 7], [4, 6], [0], [2], [5]]
    flat = [lengths[number] for batch in batches for number in batch]
    assert all(one <= other for one, other in pairwise(flat))
