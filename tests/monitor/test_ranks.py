"""Two ranks, joined by gloo, measure together what one process measures of the whole batch; none waits for ever."""

from pathlib import Path
from typing import Any

import pytest
import torch

from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.sum_layout import SumLayout
from tests.monitor import rank_regularizer, toy, two_ranks
from tests.monitor.rank_scenarios import Stream
from tests.monitor.rank_training import PLACEMENTS, STEPS, WAYS, batch, model, one_process, states_and_mask
from tests.monitor.sequence_scenarios import EQUAL, OTHERS, expected_similarity, whole
from tests.monitor.sequence_scenarios import batch as to_cut

Results = list[dict[str, dict[str, Any]]]
LAYOUT = SumLayout(5)


OF_SLICES = (
    *("adjacent_tokens", "adjacent_tokens_count"),  # by position in the slice
    *("hsic", "hsic_groups", "hsic_short_groups", "fourth_moment", "fourth_moment_max", "mask_max", "document_max"),
)
"""Sums that are those of slices where ranks hold slices of the same sequences."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the scenarios of `rank_scenarios` gave on each rank."""
    return two_ranks.run_both(tmp_path_factory.mktemp("ranks"), "gloo")


def steps_of(result: dict[str, Any]) -> list[tuple[int, tuple[int, ...]]]:
    """The steps that were written, and which ranks were silent."""
    return [(step, silent) for step, _, _, silent in result["snapshots"]]


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_equal_one_process(ranks: Results, way: str) -> None:
    """At step 0 to the rounding of sums; later steps to that of the gradients."""
    first = ranks[0][way]
    want = one_process(steps=1 if way == "plain" else STEPS)
    for (step, sums, scalars, silent), expected in zip(first["snapshots"], want, strict=way != "plain"):
        assert (step, silent) == (expected.step, ())
        tolerance = 1e-12 if step == 0 else 1e-5
        torch.testing.assert_close(sums, expected.sums, rtol=tolerance, atol=tolerance)
        assert scalars["loss"] == pytest.approx(expected.scalars["loss"], rel=1e-6)
        assert expected.tokens > 0 and expected.cka.isfinite().all()
        if way == "plain":
            break


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_have_the_same_and_the_first_alone_writes(ranks: Results, way: str) -> None:
    first, second = (results[way] for results in ranks)
    assert steps_of(first) == [(0, ()), (1, ()), (2, ())] and second["snapshots"] == []
    assert first["latest"][0] == second["latest"][0] == 2
    assert torch.equal(first["latest"][1], second["latest"][1]) and first["latest"][2:] == second["latest"][2:]
    assert torch.equal(first["latest"][1], first["snapshots"][-1][1])
    assert first["said"] == second["said"] == []


@pytest.mark.parametrize("way", WAYS)
def test_one_collective_of_one_size_per_step_and_the_same_losses(ranks: Results, way: str) -> None:
    for results in ranks:
        assert len(results[way]["sizes"]) == STEPS and len(set(results[way]["sizes"])) == 1
        assert results[way]["losses"] == results[way]["bare"]


def test_a_rank_whose_hook_fails_goes_on_taking_part(ranks: Results) -> None:
    first, second = (results["hook_fails"] for results in ranks)
    assert steps_of(first) == [(0, ()), (1, (1,)), (2, (1,))] and second["latest"][3] == (1,)
    torch.testing.assert_close(first["snapshots"][2][1], one_process((0,))[2].sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(first["latest"][1], second["latest"][1])
    assert [scalars["silent_ranks"] for _, _, scalars, _ in first["snapshots"]] == [0, 1, 1]
    assert first["losses"] == first["bare"] and second["losses"] == second["bare"]
    (said,), (failed,) = first["said"], second["said"]
    assert "step 1 is that of the other ranks of 2: rank 1 stopped monitoring" in said
    assert "stopped monitoring at step 1: RuntimeError: planted. Training goes on" in failed


def test_a_rank_that_fails_as_its_results_leave_brings_zeros(ranks: Results) -> None:
    first, second = (results["packing_fails"] for results in ranks)
    assert steps_of(first) == [(step, (0,)) for step in range(3)] and second["latest"][3] == (0,)
    torch.testing.assert_close(first["snapshots"][0][1], one_process((1,))[0].sums, rtol=1e-12, atol=1e-12)
    assert "stopped monitoring" in first["said"][0] and second["said"] == []


def test_an_empty_batch_and_no_forward(ranks: Results) -> None:
    first, second = (results["nothing_to_record"] for results in ranks)
    assert steps_of(first) == [(0, ()), (1, (1,)), (2, (1,))]  # nobody recorded step 3
    assert "rank 1 recorded nothing" in first["said"][0]
    assert "recorded nothing on step 3" in first["said"][1] and "recorded nothing on step 3" in second["said"][0]


def test_a_rank_whose_step_raises_and_goes_on(ranks: Results) -> None:
    assert steps_of(ranks[0]["step_raises"]) == [(0, ()), (1, (1,)), (2, ())]
    assert ranks[1]["step_raises"]["latest"][0] == 2


def test_a_rank_that_is_gone_is_waited_for_no_longer_than_the_timeout(ranks: Results) -> None:
    first, second = (results["ends_with_an_exception"] for results in ranks)
    assert 3 < first["seconds"] < 15 and "CollectiveError: the sums could not be added up" in first["said"][0]
    assert second["seconds"] < 1 and second["said"] == []
    assert first["latest"][0] == second["latest"][0] == 0


def test_ranks_that_meet_with_different_steps_leave_them_out(ranks: Results) -> None:
    first, second = (results["different_steps"] for results in ranks)
    assert steps_of(first) == [(0, ()), (3, ())] and second["latest"][0] == 3
    for results in (first, second):
        (said,) = results["said"]
        assert "expected all ranks to publish the same step, got {0: 1, 1: 2} by rank" in said


def test_a_rank_without_a_monitor_is_not_met(ranks: Results) -> None:
    first, second = (results["one_rank_without_a_monitor"] for results in ranks)
    assert first["total"].tolist() == second["total"].tolist() == [2.0] * 3
    assert "expected a Monitor with the same choices on every rank" in first["said"][0] and len(first["said"]) == 1
    torch.testing.assert_close(first["snapshots"][2][1], one_process((0,))[2].sums)


def test_each_rank_for_itself(ranks: Results) -> None:
    for rank, results in enumerate(ranks):
        torch.testing.assert_close(results["not_reduced"]["latest"][1], one_process((rank,))[2].sums)


def test_a_rank_that_is_late_is_not_waited_for(ranks: Results) -> None:
    first, second = (results["late"] for results in ranks)
    assert first["seconds"] < 1 and second["latest"][0] == 1 and first["said"] == []


@pytest.mark.parametrize(("scenario", "silent"), [("probe", ()), ("probe fails", (1,))], ids=lambda value: str(value))
def test_a_probe_batch(ranks: Results, scenario: str, silent: tuple[int, ...]) -> None:
    """Each rank that runs it adds the same sums. That a rank fails keeps neither the other nor the training."""
    first, second = (results[scenario] for results in ranks)
    assert first["losses"] == first["bare"] and second["losses"] == second["bare"]
    assert steps_of(first) == [(step, silent) for step in range(STEPS)]
    assert [len(results["said"]) for results in (first, second)] == [len(silent), len(silent)]
    layout = SumLayout(5, probe=True)
    tokens = int(batch(9, 0, torch.device("cpu"))[1].sum())
    values = [layout.values(sums) for _, sums, *_ in first["snapshots"]]
    assert [int(value["tokens"]) for value in values] == [tokens * (2 - len(silent))] * STEPS
    torch.testing.assert_close(values[0]["drift_first"], torch.ones(5, dtype=torch.float64))
    assert (values[-1]["drift_first"] < values[1]["drift_first"]).all()
    assert torch.equal(values[1]["drift_first"], values[1]["drift_previous"])


def test_scalars_are_averaged_by_name(ranks: Results) -> None:
    first, second = (results["scalars"] for results in ranks)
    of_first, of_second = first["latest"][2], second["latest"][2]
    assert (of_first["a"], of_first["b"]) == (of_second["a"], of_second["b"]) == (0.5, 5.0)
    assert of_second["own"] == 10.0 and len(of_first) == len(of_second) == 17 and of_first["silent_ranks"] == 0
    assert "left out 'many_14': expected at most 16 scalars" in first["said"][0]
    assert LAYOUT.views(first["latest"][1])["tokens"] > 0


@pytest.mark.parametrize("compiled", ["eager", "compiled"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_states_that_are_distributed_tensors(ranks: Results, placement: str, compiled: str) -> None:
    """Read where each rank has whole sequences; otherwise that is said, and training is what it was."""
    x, mask = states_and_mask()
    net = Stream(x.shape[-1])
    monitor = Monitor(net, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        net(x, mask).square().mean().backward()
    monitor.close()
    assert monitor.latest is not None
    for results in (results[f"{placement}, {compiled}"] for results in ranks):
        (bare, bare_graphs), (got, graphs) = results["bare"], results["got"]
        assert graphs == bare_graphs == ((0, 0) if compiled == "eager" else (1, 0))
        assert all(map(torch.equal, bare, got)) and bare[0].abs().sum() > 0
        if placement in ("replicated", "rows"):
            assert results["said"] == [] and results["latest"][0] == 1
            torch.testing.assert_close(results["latest"][1], monitor.latest.sums, rtol=1e-9, atol=1e-9)
        else:
            (said,) = results["said"]
            assert results["latest"] is None and "DTensor" in said and "Training goes on without it" in said
            assert compiled == "compiled" or f"placements ({PLACEMENTS[placement]!r},)" in said


@pytest.mark.parametrize("way", rank_regularizer.WAYS)
def test_a_regularizers_term_is_the_mean_over_ranks(ranks: Results, way: str) -> None:
    """The losses of later steps are those of training on the mean loss with the mean term."""
    want = rank_regularizer.written_out()
    for results, losses in zip(ranks, want, strict=True):
        assert results[f"regularized, {way}"]["losses"] == pytest.approx(losses, rel=1e-5)
    plain = ranks[0]["ddp"]["losses"]
    assert want[0][0] == pytest.approx(plain[0]) and abs(want[0][-1] - plain[-1]) > 1e-4


def test_a_regularizers_controller_is_the_same_on_all_ranks(ranks: Results) -> None:
    first, second = (results["regularized, controller"] for results in ranks)
    assert first["seen"] == second["seen"] and first["state"] == second["state"]
    controller, target = rank_regularizer.CONTROLLER, rank_regularizer.TARGET
    strength = torch.zeros(2, dtype=torch.float64)
    for seen in first["seen"]:
        similarity, shown = (
            torch.tensor([seen[f"repflow/regularizer/{name}/state_{layer:02}"] for layer in rank_regularizer.LAYERS])
            for name in ("similarity", "strength")
        )
        torch.testing.assert_close(shown.double(), strength, rtol=0, atol=1e-7)
        strength = controller.update(strength, similarity.double(), *controller.limits(target, "similarity"))
    assert first["state"]["strength"] == pytest.approx(strength.tolist()) and float(strength.min()) > 0


def test_a_regularizer_refuses_tensor_parallel_models(ranks: Results) -> None:
    for results in ranks:
        assert (
            "'blocks.0.linear.weight' is sharded by more than FSDP" in results["regularized, tensor parallel"]["said"]
        )


@pytest.mark.parametrize("name", EQUAL)
def test_slices_of_sequences_equal_whole_ones(ranks: Results, name: str) -> None:
    """Similarity too, which is no sum over slices. Weights are the same at every step."""
    first, second = (results[name] for results in ranks)
    assert first["said"] == second["said"] == [] and steps_of(first) == [(0, ()), (1, ()), (2, ())]
    assert torch.equal(first["latest"][1], second["latest"][1])
    for (_, sums, *_), expected in zip(first["snapshots"], whole(EQUAL[name]), strict=True):
        got, want = LAYOUT.views(sums), LAYOUT.views(expected.sums)
        for part in set(LAYOUT.shapes) - set(OF_SLICES):
            torch.testing.assert_close(got[part], want[part], rtol=0, atol=1e-6)
        assert got["sequences"] > 2 and got["tokens"] > got["sequences"] and got["adjacent_count"].sum() > 0
        assert name == "without similarity" or LAYOUT.values(sums)["update_inter_token"].isfinite().all()


@pytest.mark.parametrize("name", EQUAL | OTHERS)
def test_two_collectives_of_one_size_each_and_the_same_gradients(ranks: Results, name: str) -> None:
    case = EQUAL.get(name) or OTHERS[name]
    width = 0 if "without" in name else case.width or 16
    slices = ("slices", 64 * (9 * (width + 1) + 1 + 2 * 4), torch.float32)
    for results in (results[name] for results in ranks):
        everyone = ("everyone", results["sizes"][1][1], torch.float64)
        assert results["sizes"] == [slices, everyone] * STEPS and results["same"]


@pytest.mark.parametrize("name", ["chosen tokens", "chosen differently", "more than there is room for"])
def test_sequences_count_of_which_all_ranks_have_the_same(ranks: Results, name: str) -> None:
    first, case = ranks[0][name], OTHERS[name]
    for step, sums, *_ in first["snapshots"]:
        similarity, sequences = expected_similarity(case, step)
        values = LAYOUT.values(sums)
        torch.testing.assert_close(values["inter_token"], similarity, rtol=0, atol=1e-6)
        assert values["sequences"] == sequences > 0
    if name == "chosen tokens":
        assert first["said"] == []
    else:
        (said,) = first["said"]
        assert f"left up to {6 if 'room' in name else 1} sequences of a sequence_group out of inter-token" in said


@pytest.mark.parametrize("name", ["a hook fails", "a forward is missed", "tokens of unequal slices"])
def test_a_missing_slice_leaves_no_similarity_and_all_else(ranks: Results, name: str) -> None:
    first, second = (results[name] for results in ranks)
    without = {"a hook fails": [1, 2], "a forward is missed": [1], "tokens of unequal slices": [0, 1, 2]}[name]
    assert steps_of(first) == [(step, (1,) if "fails" in name and step else ()) for step in range(STEPS)]
    for step, sums, *_ in first["snapshots"]:
        values = LAYOUT.values(sums)
        assert values["inter_token"].isnan().all() == values["update_inter_token"].isnan().all() == (step in without)
        assert (values["sequences"] == 0) == (step in without)
        assert values["tokens"] > 0 and values["norms"].isfinite().all() and values["v_loc"] > 0
    assert any("out of inter-token similarity on step" in said for said in first["said"])
    assert torch.equal(first["latest"][1].nan_to_num(), second["latest"][1].nan_to_num())


def test_documents_and_another_width_end_monitoring_of_slices(ranks: Results) -> None:
    for results in ranks:
        # It depends on when the step arrives whether the next is measured on both ranks, or on one that says more.
        (documents,) = [said for said in results["documents"]["said"] if "stopped monitoring:" in said]
        (width,) = results["another width"]["said"]
        assert "tell documents apart (up to 2 in a slice)" in documents and "monitor.step(k, mask=...)" in documents
        assert "expected states of 8 features, as the model's config or norm says, got 16" in width
        assert results["documents"]["latest"][0] == 0 and results["another width"]["latest"] is None


def test_documents_that_end_with_slices_are_refused_too(ranks: Results) -> None:
    for result in (results["numbered"] for results in ranks):
        (said,) = result["said"]
        assert "stopped monitoring at step 1" in said and "got numbers or boundaries of documents" in said
        assert result["latest"][0] == 0 and LAYOUT.values(result["latest"][1])["sequences"] == 4


def test_slices_named_on_one_rank_only_are_not_met(ranks: Results) -> None:
    first, second = (LAYOUT.values(results["unlike"]["latest"][1]) for results in ranks)
    assert all("a Monitor with the same choices on every rank" in results["unlike"]["said"][0] for results in ranks)
    assert first["inter_token"].isnan().all() and first["tokens"] > 0  # only all ranks together could tell
    assert second["inter_token"].isfinite().all() and second["sequences"] > 0


def test_what_does_not_go_with_slices_is_refused(ranks: Results) -> None:
    for refused in (results["refusals"] for results in ranks):
        beside = "expected none of probe_batch, skip_first_tokens and reduce=False beside sequence_group, got"
        assert f"{beside} skip_first_tokens=1" in refused["skip"] and f"{beside} reduce=False" in refused["alone"]
        assert f"{beside} probe_batch" in refused["probe"] and refused["of one"] == "nothing"
        assert "expected sequence_group to lie within process_group" in refused["within"]
        assert "expected sequence_group to be the group that this rank belongs to" in refused["another's"]
        assert "expected to find the width of the states for sequence_group" in refused["width"]


def test_two_batches_each_cut_in_two(tmp_path: Path) -> None:
    """Four ranks. Where rank 3 brings nothing, the sequences of rank 2 are left out, those of the others not."""
    results = [result["two by two"] for result in two_ranks.run_both(tmp_path, "gloo", 4)]
    assert steps_of(results[0]) == [(0, ()), (1, ()), (2, (3,))]
    assert all(torch.equal(result["latest"][1], results[0]["latest"][1]) for result in results)
    where = torch.device("cpu")
    for step, sums, *_ in results[0]["snapshots"]:
        net, values = model(where), LAYOUT.values(sums)
        monitor = Monitor(net, MonitorConfig(every_n_steps=1))
        with monitor.step(0):
            for pair in (0, 1)[: 2 if step < 2 else 1]:
                ids, mask = to_cut(step, pair, 3 + pair, 12, where)
                toy.loss_of(net, ids, mask)
        monitor.close()
        assert monitor.latest is not None and values["sequences"] == monitor.latest.sequences == (7 if step < 2 else 3)
        for name in ("inter_token", "update_inter_token"):
            torch.testing.assert_close(values[name], getattr(monitor.latest, name), rtol=0, atol=1e-6)
        if step < 2:
            torch.testing.assert_close(values["norms"], monitor.latest.norms, rtol=0, atol=1e-6)
            assert values["tokens"] == monitor.latest.tokens
