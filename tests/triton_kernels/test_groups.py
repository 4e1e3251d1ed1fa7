"""Which tokens belong together."""

import pytest
import torch

from repflow.triton_kernels.groups import find_groups

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def test_every_token_finds_its_group(case, oracle):
    if (mask := case.mask) is None:
        mask = torch.ones(case.shape[1:3], dtype=torch.bool)
    got, want = find_groups(mask), oracle.token_groups(case.states, mask)
    assert got.count == len(want)
    expected = torch.full(mask.shape, -1)
    for g, group in enumerate(want):
        for position in group:
            expected[position] = g
    assert torch.equal(got.index, expected)


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS], ids=str)
def test_no_value_above_one_means_a_group_per_row(dtype: torch.dtype):
    got = find_groups(torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]]).to(dtype))
    assert got.index.tolist() == [[0, 0, -1], [-1, -1, -1], [-1, 2, 2]]
    assert (got.count, got.by_row) == (3, True)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_documents_are_numbered_by_row_then_number(dtype: torch.dtype):
    """Row 0 lacks document 1 and holds them out of order; row 1 has no token; row 2 uses the largest number of int8."""
    got = find_groups(torch.tensor([[3, 3, 2, 0], [0, 0, 0, 0], [127, 1, 127, 127]]).to(dtype))
    assert got.index.tolist() == [[1, 1, 0, -1], [-1, -1, -1, -1], [3, 2, 3, 3]]
    assert (got.count, got.by_row) == (4, False)


def test_as_many_documents_as_rows_are_still_documents():
    got = find_groups(torch.tensor([[1, 1, 2], [0, 0, 0]]))
    assert got.index.tolist() == [[0, 0, 1], [-1, -1, -1]]
    assert (got.count, got.by_row) == (2, False)
