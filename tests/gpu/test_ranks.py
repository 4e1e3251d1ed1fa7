"""Two ranks on two GPUs, joined by NCCL: what tests/monitor/test_ranks.py asks of gloo."""

import pytest
import torch

from tests.monitor import two_ranks
from tests.monitor.rank_training import STEPS, WAYS, one_process
from tests.monitor.sequence_scenarios import EQUAL, whole
from tests.monitor.test_ranks import LAYOUT, Results, steps_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the scenarios of `rank_scenarios` gave on each rank."""
    return two_ranks.run_both(tmp_path_factory.mktemp("ranks"), "nccl")


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_equal_one_process(ranks: Results, way: str) -> None:
    first, second = (results[way] for results in ranks)
    (expected,) = one_process(steps=1, where=torch.device("cuda", 0))
    torch.testing.assert_close(first["snapshots"][0][1], expected.sums, rtol=1e-6, atol=1e-6)
    assert steps_of(first) == [(0, ()), (1, ()), (2, ())] and second["snapshots"] == []
    assert torch.equal(first["latest"][1], second["latest"][1]) and first["latest"][2:] == second["latest"][2:]
    for results in (first, second):
        assert len(results["sizes"]) == STEPS and len(set(results["sizes"])) == 1
        assert results["losses"] == results["bare"] and results["said"] == []


@pytest.mark.parametrize("name", EQUAL)
def test_slices_of_sequences_equal_whole_ones(ranks: Results, name: str) -> None:
    """Publishing raises if it waits for the device."""
    first, second = (results[name] for results in ranks)
    assert first["said"] == second["said"] == [] and steps_of(first) == [(0, ()), (1, ()), (2, ())]
    for (_, sums, *_), expected in zip(first["snapshots"], whole(EQUAL[name]), strict=True):
        values = LAYOUT.values(sums)
        assert values["sequences"] == expected.sequences and values["tokens"] == expected.tokens
        for part in ("inter_token", "update_inter_token", "adjacent", "norms", "v_loc", "v_glob"):
            want = getattr(expected, part)
            torch.testing.assert_close(values[part], want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_no_rank_waits_for_one_that_fails_or_has_nothing(ranks: Results) -> None:
    first = ranks[0]
    assert steps_of(first["hook_fails"]) == [(0, ()), (1, (1,)), (2, (1,))]
    assert steps_of(first["packing_fails"]) == [(step, (0,)) for step in range(3)]
    assert steps_of(first["nothing_to_record"]) == [(0, ()), (1, (1,)), (2, (1,))]
    assert steps_of(first["step_raises"]) == [(0, ()), (1, (1,)), (2, ())]
    assert steps_of(first["a hook fails"]) == [(0, ()), (1, (1,)), (2, (1,))]
    assert steps_of(first["different_steps"]) == [(0, ()), (3, ())]
    assert first["one_rank_without_a_monitor"]["total"].tolist() == [2.0] * 3
    for results in ranks:
        assert results["hook_fails"]["losses"] == results["hook_fails"]["bare"]


def test_neither_host_nor_stream_waits_for_a_late_rank(ranks: Results) -> None:
    """Nor does publishing wait for the own device: everything that does raises there."""
    assert ranks[0]["late"]["seconds"] < 1 and ranks[0]["late"]["said"] == ranks[1]["late"]["said"] == []
    assert ranks[1]["late"]["latest"][0] == 1
