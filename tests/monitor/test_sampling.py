"""Sampling depends on the step and the seed alone."""

import pytest
import torch

from repflow.monitor.positions import token_positions, without_first
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
    positions = token_positions(find_groups(mask.bool() if kind == "bool" else mask))
    valid = mask.bool()
    assert positions.rank[valid].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3]
    assert positions.size[valid].tolist() == [4, 4, 4, 4, 2, 2, 4, 4, 4, 4]
    assert positions.bins(4)[0, 2:].tolist() == [0, 1, 2, 3] and positions.bins(4)[1, :2].tolist() == [0, 2]


def test_positions_in_packed_documents() -> None:
    mask = torch.tensor([[1, 1, 1, 2, 2, 0], [3, 3, 5, 5, 5, 5]])
    positions = token_positions(find_groups(mask))
    assert positions.rank[mask > 0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 1, 2, 3]
    assert positions.size[mask > 0].tolist() == [3, 3, 3, 2, 2, 2, 2, 4, 4, 4, 4]
    assert without_first(mask, positions, 2).tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 5, 5]]
    assert without_first(mask, positions, 0) is mask
