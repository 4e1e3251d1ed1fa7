"""Fewer values, and none of the important ones lost."""

import numpy as np
import pytest

from repflow.monitor.report._thin import bin_maxima, rounded, spread


@pytest.mark.parametrize("count", [1, 2, 29, 30, 31, 1000])
def test_spread(count: int):
    kept = spread(count, 30)
    assert len(kept) == min(count, 30)
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert np.ptp(np.diff(kept)) <= 1 if count > 1 else True


def test_bin_maxima_agree_with_a_loop():
    values = np.random.default_rng(0).normal(size=(97, 3))
    values[10:40] = np.nan
    ends = spread(97, 9)
    expected = []
    for start, end in zip([-1, *ends[:-1]], ends, strict=True):
        part = values[start + 1 : end + 1]
        expected.append([max((v for v in column if v == v), default=np.nan) for column in part.T])
    np.testing.assert_array_equal(bin_maxima(values, 9), expected)


def test_few_values_are_their_own_maxima():
    values = np.arange(5.0)
    np.testing.assert_array_equal(bin_maxima(values, 9), values)


def test_rounded_has_no_numbers_that_json_lacks():
    assert rounded(np.array([[0.123456, np.nan], [np.inf, -1234567.0]])) == [[0.1235, None], [None, -1235000.0]]
