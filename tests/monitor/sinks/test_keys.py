import math

import pytest

from repflow.monitor.sinks._keys import chosen_states, scalar_items


def test_all_keys_of_a_small_stream(synthetic):
    snapshot = synthetic.make_snapshot(3, 4)
    items = scalar_items(snapshot)
    states, transitions = range(4), range(3)
    expected = {f"repflow/inter_token/state_0{i}": float(snapshot.inter_token[i]) for i in states}
    expected |= {f"repflow/norms/state_0{i}": float(snapshot.norms[i]) for i in states}
    expected |= {f"repflow/hsic_top_token/state_0{i}": float(snapshot.hsic_top_token[i]) for i in states}
    expected |= {f"repflow/adjacent/transition_0{i}": float(snapshot.adjacent[i]) for i in transitions}
    expected |= {
        f"repflow/update_inter_token/transition_0{i}": float(snapshot.update_inter_token[i]) for i in transitions
    }
    expected |= {f"repflow/local_variance/state_0{i + 1}": float(snapshot.local_variance[i]) for i in range(2)}
    expected |= {
        "repflow/v_loc": float(snapshot.v_loc),
        "repflow/v_glob": float(snapshot.v_glob),
        "repflow/v_loc_rel": float(snapshot.v_loc_rel),
        "repflow/v_glob_rel": float(snapshot.v_glob_rel),
        "repflow/cka_first_last": float(snapshot.cka[0, 3]),
        "repflow/nonfinite": float(snapshot.nonfinite.sum()),
        "repflow/zero": float(snapshot.zero.sum()),
        "repflow/tokens": float(snapshot.tokens),
        "repflow/sequences": float(snapshot.sequences),
        "repflow/overhead_ms": 3.5,
    }
    assert items == expected
    assert all(type(value) is float for value in items.values())


@pytest.mark.parametrize(
    ("count", "states", "expected"),
    [
        (16, "auto", list(range(16))),
        (17, "auto", [0, 4, 8, 12, 16]),
        (65, "auto", [0, 16, 32, 48, 64]),
        (20, "all", list(range(20))),
        (20, [7, 3, 3, -1], [3, 7, 19]),
        (20, [], []),
    ],
)
def test_chosen_states(count, states, expected):
    assert chosen_states(count, states) == expected


def test_a_deep_stream_shows_few_states_with_three_digits(synthetic):
    snapshot = synthetic.make_snapshot(0, 102)
    keys = scalar_items(snapshot)
    assert [key for key in keys if "/inter_token/" in key] == [
        f"repflow/inter_token/state_{state:03}" for state in (0, 25, 50, 75, 101)
    ]
    assert [key for key in keys if "/adjacent/" in key] == [
        f"repflow/adjacent/transition_{transition:03}" for transition in (0, 25, 50, 75, 100)
    ]
    assert [key for key in keys if "/local_variance/" in key] == [
        f"repflow/local_variance/state_{state:03}" for state in (25, 50, 75)
    ]
    assert keys["repflow/local_variance/state_025"] == float(snapshot.local_variance[24])
    assert keys["repflow/adjacent/transition_100"] == float(snapshot.adjacent[100])
    assert "repflow/inter_token/state_99" in scalar_items(synthetic.make_snapshot(0, 100), "all")


def test_the_separator_of_a_logger(synthetic):
    keys = scalar_items(synthetic.make_snapshot(0), separator="-")
    assert "repflow-inter_token-state_00" in keys and "repflow-v_loc" in keys
    assert not [key for key in keys if "/" in key]


def test_what_was_not_measured_is_there_as_nan(synthetic):
    items = scalar_items(synthetic.make_snapshot(0, sums=synthetic.make_sums(0) * 0))
    assert items.keys() == scalar_items(synthetic.make_snapshot(0)).keys()
    assert math.isnan(items["repflow/v_loc"]) and math.isnan(items["repflow/cka_first_last"])
    assert items["repflow/tokens"] == 0


@pytest.mark.parametrize("states", [[6], [-7], [0, 99]])
def test_states_that_are_not_there(synthetic, states):
    with pytest.raises(ValueError, match="from 0 to 5"):
        scalar_items(synthetic.make_snapshot(0), states)
