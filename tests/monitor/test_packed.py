"""Packed rows: documents are told from masks, positions, numbers or boundaries, and no pair crosses them.

On a GPU their number cannot be known without waiting, so that there is room for so many; the kernels do the same here,
in Triton's interpreter.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from repflow.monitor import Monitor, MonitorConfig, Snapshot
from repflow.monitor.masks import CallMasks, token_groups
from repflow.triton_kernels._dispatch import force
from repflow.triton_kernels.groups import find_groups, group_members
from tests.monitor import toy

LENGTHS = [[5, 1, 6], [12], [2, 4, 3, 3]]
"""Of the documents of each row."""


def packed(lengths: list[list[int]], tokens: int = 12) -> Tensor:
    """Document numbers from 1, and padding behind."""
    numbers = [torch.arange(1, len(row) + 1).repeat_interleave(torch.tensor(row)) for row in lengths]
    return torch.stack([torch.nn.functional.pad(row, (0, tokens - len(row))) for row in numbers])


def measure(mask: Tensor | None, *, triton: bool = True, steps: int = 1, **options: Any) -> list[Snapshot]:
    """Snapshots of a model whose weights stay as they are."""
    torch.manual_seed(0)
    model, seen = toy.Toy(blocks=2), []
    for block in model.blocks:
        block.dropout.p = 0.0  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    # The interpreter takes its time over groups, also over empty ones.
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, **{"max_documents": 6, **options}))
    ids = toy.batch(3 if mask is None else len(mask), 12 if mask is None else mask.shape[1])
    with force("triton") if triton else nullcontext():
        for step in range(steps):
            with monitor.step(step, mask=mask):
                toy.loss_of(model, ids).backward()
            monitor.flush()
            assert monitor.enabled
            if monitor.latest is not None:
                seen.append(monitor.latest)
    return seen


def assert_same(one: Snapshot, other: Snapshot) -> None:
    """But for float32 in the kernels."""
    assert (one.tokens, one.sequences) == (other.tokens, other.sequences)
    for name in ("inter_token", "update_inter_token", "adjacent", "norms", "v_loc", "v_glob", "adjacent_tokens"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(one.cka, other.cka, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("skip", [0, 1])
def test_the_kernels_measure_what_the_reference_measures(skip: int) -> None:
    (ours,) = measure(packed(LENGTHS), skip_first_tokens=skip)
    (expected,) = measure(packed(LENGTHS), triton=False, skip_first_tokens=skip)
    assert_same(ours, expected)
    assert ours.sequences == (8 if not skip else 7)


def test_each_document_is_measured_as_if_it_were_alone() -> None:
    """Of a model without attention, in which packing changes no state."""
    (together,) = measure(packed([[5, 7]]))
    rows = torch.zeros(2, 12, dtype=torch.bool)
    rows[0, :5] = rows[1, 5:] = True
    torch.manual_seed(0)
    model = toy.Toy(blocks=2)
    for block in model.blocks:
        block.dropout.p = 0.0  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0, mask=rows):
        toy.loss_of(model, toy.batch(1, 12).repeat(2, 1)).backward()
    monitor.flush()
    assert monitor.latest is not None
    torch.testing.assert_close(together.inter_token, monitor.latest.inter_token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.cka, monitor.latest.cka, rtol=0, atol=1e-4)


def test_documents_beyond_the_room_are_left_out_and_said() -> None:
    """Three rows, so that the first five of eight documents are measured; what is of tokens is of all tokens."""
    with pytest.warns(
        RuntimeWarning, match="left up to 3 documents of a micro-batch out of similarity or CKA on step 0"
    ):
        (ours,) = measure(packed(LENGTHS), max_documents=2)
    (first,) = measure(packed([[5, 1, 6], [12], [2]]), triton=False)
    (all_of_them,) = measure(packed(LENGTHS), triton=False)
    assert (ours.sequences, ours.tokens) == (5, 36)
    for name in ("inter_token", "update_inter_token", "cka"):
        torch.testing.assert_close(getattr(ours, name), getattr(first, name), rtol=1e-5, atol=1e-4)
    for name in ("norms", "adjacent", "v_loc", "adjacent_tokens"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(all_of_them, name), rtol=1e-5, atol=1e-6, equal_nan=True
        )


def test_many_short_rows_have_room_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repflow.monitor.accumulator._SUM_BYTES", 16 * 3 * 16 * 2)  # two rows at once
    mask = packed([[2, 1], [3], [1, 2], [2], [0], [3]], tokens=3)
    (ours,) = measure(mask, max_documents=1)
    (expected,) = measure(mask, triton=False)
    assert_same(ours, expected)


def test_masks_of_numbers_become_padding_once_that_is_all_they_say(recwarn: pytest.WarningsRecorder) -> None:
    """The first step finds out; documents that come later are missed once, and then measured."""
    torch.manual_seed(0)
    model = toy.Toy(blocks=1)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, max_documents=6, metrics=("inter_token",)))
    padded = packed([[12], [9], [4]])
    looked: list[bool] = []
    with force("triton"):
        for step, mask in enumerate([None, padded, padded, padded.bool(), packed(LENGTHS), packed(LENGTHS), padded]):
            with monitor.step(step, mask=mask):
                toy.loss_of(model, toy.batch(3, 12)).backward()
            assert monitor._step is not None and monitor._step.sums is not None
            looked.append(monitor._step.sums.counted_documents)
            if step == 4:
                with pytest.warns(RuntimeWarning, match=r"left out step 4: .* \(up to 4 in a row\), unlike those"):
                    monitor.flush()
            monitor.flush()
            assert monitor.latest is not None
            expected = (3, 3) if step == 4 else (step, 8 if step == 5 else 3)
            assert (monitor.latest.step, monitor.latest.sequences) == expected
    assert looked == [False, True, False, False, False, True, True] and monitor.enabled
    assert not [entry for entry in recwarn if "repflow" in str(entry.message)]


def test_a_row_of_padding_does_not_hide_that_others_are_packed(recwarn: pytest.WarningsRecorder) -> None:
    mask = packed([[6, 6], [0]])
    for snapshot in measure(mask, steps=2, metrics=("inter_token",)):
        assert snapshot.sequences == 2
    assert not [entry for entry in recwarn if "left out" in str(entry.message)]


@pytest.mark.parametrize("triton", [False, True])
def test_labels_are_no_mask(triton: bool) -> None:
    """Negative numbers are refused, or padding where a GPU would be waited for to refuse them; never documents."""
    mask = torch.tensor([[1, 2, 2, 2], [-1, -1, 1, 2]])
    model, ids = toy.Toy(blocks=1), toy.batch(2, 4)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, max_documents=2, metrics=("inter_token",)))
    refused = pytest.warns(RuntimeWarning, match="expected document numbers from 0 .padding. up, got -1")
    with force("triton") if triton else refused:
        with monitor.step(0, mask=mask):
            toy.loss_of(model, ids).backward()
        monitor.flush()
    assert monitor.enabled == triton
    if triton:
        assert monitor.latest is not None and (monitor.latest.tokens, monitor.latest.sequences) == (6, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("room", [8, 40])
def test_groups_with_room_are_the_groups(dtype: torch.dtype, room: int) -> None:
    numbers = torch.tensor([0, 1, 2, 7])[torch.randint(0, 4, (5, 9), generator=torch.Generator().manual_seed(1))]
    mask = numbers.to(dtype)
    exact, ours = find_groups(mask), find_groups(mask, room)
    assert exact.count > 8 and ours.count == room and ours.found is not None and int(ours.found) == exact.count
    assert torch.equal(ours.index, exact.index.masked_fill(exact.index >= room, -1))
    assert torch.equal(ours.valid, mask != 0) and ours.sizes.sum() == (ours.index >= 0).sum()
    for (token, member), groups in ((group_members(exact), exact), (group_members(ours), ours)):
        for group in range(min(room, exact.count)):
            tokens = (groups.index.flatten() == group).nonzero().flatten()
            assert token[group][member[group]].tolist() == tokens.tolist()
        assert member.sum() == (groups.index >= 0).sum()


ARANGE = torch.arange(12).unsqueeze(0)
TOLD: dict[str, tuple[CallMasks, list[int]]] = {
    "positions": (CallMasks(position_ids=ARANGE % 5), [5, 5, 2]),
    "numbers": (CallMasks(segments=ARANGE // 5), [5, 5, 2]),
    "numbers, padding below 0": (CallMasks(segments=(ARANGE // 5 - 1)), [5, 2]),
    "boundaries": (CallMasks(boundaries=torch.tensor([0, 5, 6, 12])), [5, 1, 6]),
    "boundaries that are filled up": (CallMasks(boundaries=torch.tensor([0, 5, 12, 12, 12])), [5, 7]),
    "boundaries before the end": (CallMasks(boundaries=torch.tensor([0, 5, 9], dtype=torch.int32)), [5, 4]),
    "padding and positions": (CallMasks(ARANGE % 6 != 5, ARANGE % 6), [5, 5]),
    "numbers in the mask, positions that go on": (CallMasks(ARANGE // 6 + 1, ARANGE), [6, 6]),
    "numbers in the mask with a gap": (CallMasks((ARANGE // 6 + 1) * (ARANGE % 6 != 0), ARANGE), [5, 5]),
    "a mask of ones, positions that go on": (CallMasks(torch.ones_like(ARANGE), ARANGE), [12]),
    "left padding, positions of it anything": (CallMasks(ARANGE > 2, (ARANGE - 3).clamp(min=1)), [1, 8]),
    "boundaries and positions": (CallMasks(position_ids=ARANGE % 6, boundaries=torch.tensor([0, 4, 12])), [4, 2, 6]),
}


@pytest.mark.parametrize("told", TOLD)
def test_documents_however_they_are_told(told: str) -> None:
    masks, lengths = TOLD[told]
    numbers = token_groups(masks, 1, 12)
    assert numbers is not None
    assert [int((numbers == k).sum()) for k in range(1, int(numbers.max()) + 1)] == lengths


def test_boundaries_of_several_rows_say_nothing() -> None:
    """They are of one row without padding, which the states would not show."""
    assert token_groups(CallMasks(boundaries=torch.tensor([0, 5, 24])), 2, 12) is None


@pytest.mark.parametrize("arguments", ["position_ids", "cu_seq_lens_q"])
def test_a_real_model_is_given_packed_rows(arguments: str) -> None:
    """As the padding-free collators of transformers and TRL pass them."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.LlamaForCausalLM(config).train()
    told: dict[str, Tensor] = {"position_ids": torch.cat([torch.arange(n) for n in (10, 4, 10)]).unsqueeze(0)}
    if arguments != "position_ids":
        boundaries = torch.tensor([0, 10, 14, 24], dtype=torch.int32)
        told = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        model(input_ids=torch.arange(24).unsqueeze(0), **told).logits.sum().backward()
    monitor.flush()
    assert monitor.latest is not None and (monitor.latest.sequences, monitor.latest.tokens) == (3, 24)
