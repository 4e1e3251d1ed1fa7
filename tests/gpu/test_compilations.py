"""Kernels are compiled once per class of shapes, on its first use, and not again when sequence lengths change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from repflow.triton_kernels import depth_and_token_sums, depth_statistics, pairwise_hsic, token_sums
from repflow.triton_kernels._dispatch import use_triton
from tests.gpu.compilations import count_compilations

LENGTHS = (1, 2, 3, 7, 16, 17, 63, 64, 127, 128, 129, 255, 256, 300, 512, 777, 1000, 1024, 1025, 2000, 2047, 2048)
ROWS = (1, 2, 3, 5)
FUNCTIONS = (depth_statistics, token_sums, depth_and_token_sums, pairwise_hsic)


def masks(rows: int, tokens: int) -> list[Tensor | None]:
    """None, padding on the right, documents that do not end with the row, and everything padded."""
    position = torch.arange(tokens, device="cuda").expand(rows, -1)
    keep = position < tokens - torch.arange(rows, device="cuda").unsqueeze(1)
    return [None, keep, position // 200 + 1, torch.zeros_like(keep)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_lengths_rows_and_masks_share_compilations(function: Callable[..., Any], dtype: torch.dtype) -> None:
    """The classes: with a mask, without, documents; for HSIC also rows of up to 128 tokens and longer ones."""
    features = 200 + 8 * FUNCTIONS.index(function)  # of no other test: nothing is compiled yet

    def call(rows: int, tokens: int) -> None:
        states = torch.randn(5, rows, tokens, features, device="cuda").to(dtype)
        assert use_triton(states)
        for mask in masks(rows, tokens):
            function(states, mask)

    with count_compilations() as first:
        for tokens in (100, 1024):
            call(2, tokens)
    assert first
    with count_compilations() as later:
        for i, tokens in enumerate(LENGTHS):
            call(ROWS[i % len(ROWS)], tokens)
    assert not later


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_storage_at_an_odd_place_is_one_more_class(function: Callable[..., Any]) -> None:
    """Loads of 16 bytes need addresses and rows that are multiples of 16."""
    memory = torch.randn(4, 3, 600, 264, device="cuda").bfloat16()

    def call(tokens: int, start: int) -> None:
        function(memory[:, :, :tokens, start : start + 256])

    for tokens in (100, 513):
        for start in (0, 1):
            call(tokens, start)
    with count_compilations() as later:
        for tokens in (5, 128, 129, 400, 512, 600):
            for start in (0, 1, 3, 5, 7, 8):
                call(tokens, start)
    assert not later
