"""Sampling depends on the step and the seed alone."""

import pytest
import torch

from repflow.monitor.positions import every_position, token_positions, without_first
from repflow.monitor.sampling import Schedule, select
from repflow.triton_kernels.groups import find_groups


def indices(selection, batch: tuple[int, int]) -> tuple[list[int], list[int]]:
    grid = torch.arange(batch[0] * batch[1]).view(batch)
    taken = selection.take(grid)
    return (taken[:, 0] // batch[1]).tolist(), (taken[0] % batch[1]).tolist()


def test_schedule_counts_from_step_zero() -> None:
    assert [step for step in range(11) if Schedule(5)(step)] == [0, 5, 10]


@pytest.mark.parametrize(
    ("batch", "budget", "shape"),
    [((4, 8), 32, (4, 8)), ((4, 8), 31, (3, 8)), ((4, 8), 8, (1, 8)), ((4, 8), 7, (1, 7)), ((1, 100), 4, (1, 4))],
)
def test_whole_sequences_first(batch, budget, shape) -> None:
    selection = select(batch, budget, seed=0, step=3, forward=1)
    rows, tokens = indices(selection, batch)
    assert selection.shape == shape == (len(rows), len(tokens))
    assert rows == sorted(set(rows)) and tokens == sorted(set(tokens))
    assert selection.take(torch.zeros(*batch, 5)).shape == (*shape, 5)


def test_everything_is_taken_without_a_copy() -> None:
    values = torch.zeros(4, 8)
    assert select((4, 8), 32, seed=0, step=0, forward=0).take(values) is values


@pytest.mark.parametrize(
    ("batch", "budget"), [((4, 8), 32), ((9, 8), 41), ((40, 8), 160), ((4, 8), 16), ((4, 8), 8), ((4, 8), 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copied_as_taken(batch, budget, dtype) -> None:
    """Rows first or behind another dimension, into the same dtype or a wider one."""
    values = torch.randn(*batch, 3)
    for step in range(8):
        selection = select(batch, budget, seed=0, step=step, forward=0)
        taken = selection.take(values)
        target = torch.empty(*selection.shape, 3, dtype=dtype)
        selection.copy_into(target, values)
        assert torch.equal(target, taken.to(dtype))
        stacked = torch.stack([values, -values])
        assert torch.equal(selection.take(stacked, dim=1), torch.stack([taken, -taken]))


def test_one_or_two_rows_are_a_view() -> None:
    """So that states of a whole sequence are not copied again for CKA."""
    states = torch.zeros(3, 8, 16, 5)
    for step in range(20):
        for rows in (1, 2):
            part = select((8, 16), rows * 16, seed=0, step=step, forward=0).take(states, dim=1)
            assert part.shape == (3, rows, 16, 5) and part._base is states


def test_rows_are_uniform() -> None:
    """4000 draws of 3 of 8 rows: each is drawn equally often, within 5 standard deviations."""
    counts = torch.zeros(8)
    for step in range(4000):
        counts[indices(select((8, 4), 12, seed=0, step=step, forward=0), (8, 4))[0]] += 1
    assert (counts - 1500).abs().max() < 5 * (4000 * 0.375 * 0.625) ** 0.5


def test_same_step_and_seed_same_tokens_whatever_the_random_state() -> None:
    before = torch.random.get_rng_state()
    first = indices(select((64, 500), 100, seed=5, step=7, forward=2), (64, 500))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert indices(select((64, 500), 100, seed=5, step=7, forward=2), (64, 500)) == first
    others = [(6, 7, 2), (5, 8, 2), (5, 7, 3)]
    for seed, step, forward in others:
        assert indices(select((64, 500), 100, seed=seed, step=step, forward=forward), (64, 500)) != first


def test_tokens_of_a_long_sequence_are_uniform() -> None:
    """4000 draws of 10 among 40 positions: each is drawn equally often, within 5 standard deviations."""
    counts = torch.zeros(40)
    for step in range(4000):
        counts[indices(select((1, 40), 10, seed=0, step=step, forward=0), (1, 40))[1]] += 1
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("kind", ["bool", "int"])
def test_positions_ignore_padding_on_either_side(kind) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1]])
    positions = token_positions(mask.bool() if kind == "bool" else mask)
    valid = mask.bool()
    assert positions.rank[valid].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3]
    assert positions.size[valid].tolist() == [4, 4, 4, 4, 2, 2, 4, 4, 4, 4]
    assert positions.bins(4)[0, 2:].tolist() == [0, 1, 2, 3] and positions.bins(4)[1, :2].tolist() == [0, 2]


def test_positions_where_every_token_is_valid() -> None:
    every, masked = every_position(3, 5, torch.device("cpu")), token_positions(torch.ones(3, 5, dtype=torch.bool))
    assert torch.equal(every.rank, masked.rank) and torch.equal(every.bins(64), masked.bins(64))
    assert without_first(None, every, 0) is None
    kept = without_first(None, every, 2)
    assert kept is not None and kept.tolist() == [[False, False, True, True, True]] * 3


@pytest.mark.parametrize(
    ("mask", "sizes"),
    [([[1, 0, 1], [0, 0, 0]], [2, 0]), ([[1, 1, 2], [3, 0, 0]], [2, 1, 1])],
)
def test_sizes_of_groups(mask, sizes) -> None:
    assert find_groups(torch.tensor(mask)).sizes.tolist() == sizes
    if max(map(max, mask)) == 1:
        assert find_groups(torch.tensor(mask).bool()).sizes.tolist() == sizes


def test_positions_in_packed_documents() -> None:
    mask = torch.tensor([[1, 1, 1, 2, 2, 0], [3, 3, 5, 5, 5, 5]])
    positions = token_positions(mask)
    assert positions.rank[mask > 0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 2, 3]
    assert positions.size[mask > 0].tolist() == [3, 3, 3, 2, 2, 2, 2, 4, 4, 4, 4]
    kept = without_first(mask, positions, 2)
    assert kept is not None and kept.tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 5, 5]]
    assert without_first(mask, positions, 0) is mask
