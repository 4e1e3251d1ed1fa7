import numpy as np
import pytest

from repflow.monitor.sinks.heatmap import (
    NOT_MEASURED,
    DepthHistory,
    Heatmap,
    HeatmapSeries,
    Thinning,
    colorize,
    enlarge,
)


def test_lightness_grows_with_the_value():
    rgb = colorize(np.linspace(0, 1, 200)[None, :])[0].astype(float)
    lightness = rgb @ [0.2126, 0.7152, 0.0722]
    assert np.all(np.diff(lightness) >= 0)
    assert lightness[-1] - lightness[0] > 180


def test_ends_and_missing_values():
    rgb = colorize(np.array([[-5.0, 0.0, 0.5, 1.0, np.inf, np.nan]]))[0]
    assert tuple(rgb[0]) == tuple(rgb[1]) == (0x44, 0x01, 0x54)
    assert tuple(rgb[2]) == (0x21, 0x91, 0x8C)
    assert tuple(rgb[3]) == tuple(rgb[4]) == (0xFD, 0xE7, 0x25)
    assert tuple(rgb[5]) == NOT_MEASURED
    palette = colorize(np.linspace(0, 1, 1000)[None, :])[0].astype(int)
    assert np.abs(palette - NOT_MEASURED).sum(axis=1).min() > 50


def test_a_scale_of_its_own():
    np.testing.assert_array_equal(colorize(np.array([[2.0, 4.0]]), 2.0, 4.0), colorize(np.array([[0.0, 1.0]])))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (12, 12), (65, 256), (255, 257), (600, 7)])
def test_enlarging_repeats_whole_pixels(height, width):
    rgb = np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)
    large = enlarge(rgb)
    for side, before in zip(large.shape, (height, width), strict=False):
        assert 256 < side <= 512 or side == before
    tall, wide = large.shape[0] // height, large.shape[1] // width
    np.testing.assert_array_equal(large[::tall, ::wide], rgb)
    np.testing.assert_array_equal(large[tall - 1 :: tall, wide - 1 :: wide], rgb)


def test_state_0_lies_at_the_bottom():
    image = Heatmap("cka", 0, "", np.array([[0.0], [1.0]])).rgb()
    assert tuple(image[0, 0]) == (0xFD, 0xE7, 0x25)
    assert tuple(image[-1, 0]) == (0x44, 0x01, 0x54)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 17, 1000])
def test_the_history_stays_bounded_and_even(count):
    history = DepthHistory(max_columns=8)
    for number in range(count):
        history.add(np.full(3, float(number)))
    columns = history.matrix()
    assert columns.shape[0] == 3
    kept = columns[0]
    assert min(count, 4) <= len(kept) <= 8
    assert kept[0] == 0
    gaps = set(np.diff(kept))
    assert len(gaps) <= 1
    assert count - 1 - kept[-1] < (gaps.pop() if gaps else 1)


@pytest.mark.parametrize("limit", [1, 3, 10, 149])
def test_thinning_keeps_to_its_limit(limit):
    show = Thinning(limit)
    shown = [number for number in range(200 * limit) if show()]
    assert len(shown) <= limit
    assert shown[0] == 0
    gaps = np.diff(shown)
    assert np.all(np.diff(gaps) >= 0)
    assert set(gaps) <= {2**stage for stage in range(11)}
    assert len(shown) >= 0.7 * limit


def test_a_series_of_a_long_run(synthetic):
    series = HeatmapSeries(max_images=12)
    drawn = [series.add(synthetic.make_snapshot(step)) for step in range(40)]
    shown = [step for step, maps in enumerate(drawn) if maps]
    assert shown == [0, 2, 6, 14, 30]
    for step in shown:
        cka, history = drawn[step]
        assert (cka.name, history.name, cka.step, history.step) == ("cka", "inter_token", step, step)
        np.testing.assert_array_equal(cka.matrix, synthetic.make_snapshot(step).cka)
        assert history.matrix.shape == (6, step + 1)
        np.testing.assert_array_equal(history.matrix[:, step], synthetic.make_snapshot(step).inter_token)
    last = series.last()
    assert [heatmap.step for heatmap in last] == [39, 39]
    assert series.last() == []


def test_too_few_images():
    with pytest.raises(ValueError, match="at least 4, got 3; heatmaps=False"):
        HeatmapSeries(3)
