"""The arithmetic of each rule and of the hysteresis, on snapshots with chosen values."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import pytest
import torch

from repflow.monitor import Alert, Monitor, MonitorConfig, RepflowWarning, Signature, Snapshot
from repflow.monitor.alert import Severity
from repflow.monitor.signatures import (
    DEFAULT,
    CollapseOnset,
    DeadBlocks,
    EarlyOversmoothing,
    LateHomogenisation,
    MassiveActivations,
    NonFinite,
    NormExplosion,
    ProbingDrop,
    Reading,
    RedundantLayers,
    SignatureBook,
    judge_probing,
)
from repflow.monitor.snapshot import BlockInfo
from repflow.monitor.sum_layout import SumLayout
from tests.monitor import toy

BLOCKS = tuple(BlockInfo(index=i, name=f"layers.{i}", kind="attention" if i < 4 else "ssm") for i in range(8))


def snapshot(step: int = 0, states: int = 9, **values: Any) -> Snapshot:
    """Nothing measured but the given values."""
    sums = SumLayout(states).zeros()
    made = Snapshot.from_sums(sums, num_states=states, step=step, stream="layers", overhead_ms=0.0)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return replace(made, **tensors)


def judge(signature: Signature, series: Sequence[Snapshot], book: SignatureBook | None = None) -> list[Alert]:
    book = book or SignatureBook([signature])
    return [alert for each in series for alert in book.judge(each, BLOCKS)]


def similar(values: Sequence[float], step: int = 0) -> list[Snapshot]:
    """Snapshots of which state 2 has these similarities, and all others .1."""
    return [
        snapshot(step + i, inter_token=[value if state == 2 else 0.1 for state in range(9)])
        for i, value in enumerate(values)
    ]


EARLY = EarlyOversmoothing(warmup_steps=0, patience=2)


def test_an_alert_is_raised_after_patience_once_and_again_after_release():
    #         no   1st  raise -    -     above release   released  1st  raise
    series = [0.5, 0.9, 0.90, 0.9, 0.95, 0.78, 0.78, 0.9, 0.74, 0.9, 0.85]
    assert [alert.step for alert in judge(EARLY, similar(series))] == [2, 10]


def test_an_alert_says_where_how_much_and_what_to_do():
    (alert,) = judge(EARLY, similar([0.9, 0.91]))
    assert alert == Alert(
        step=1,
        signature="early_oversmoothing",
        severity="warning",
        title="Tokens become alike early in depth",
        message="Inter-token similarity: 0.91 at state 2, the output of block 1 'layers.1' (attention); "
        "expected at most 0.8; seen in 2 snapshots in a row",
        suggestion=EARLY.suggestion,
        states=(2,),
        value=0.91,
        threshold=0.80,
    )
    assert str(alert).startswith("warning at step 1: Tokens become alike early in depth. Inter-token similarity: 0.91")
    assert json.loads(json.dumps(alert.to_dict()))["states"] == [2]


def test_it_must_be_the_same_state_that_violates():
    first, second = ([0.9 if state == hit else 0.1 for state in range(9)] for hit in (1, 2))
    series = [snapshot(step, inter_token=(first, second)[step % 2]) for step in range(8)]
    assert judge(EARLY, series) == []


def test_what_was_not_measured_neither_counts_nor_interrupts():
    (alert,) = judge(EARLY, similar([0.9, math.nan, 0.9]))
    assert alert.step == 2
    book = SignatureBook([EARLY])
    judge(EARLY, similar([0.9, 0.9, math.nan]), book)
    assert book.raised == {"early_oversmoothing": True}


def test_warm_up_is_not_looked_at():
    rule = replace(EARLY, warmup_steps=5)
    assert [alert.step for alert in judge(rule, similar([0.9] * 10))] == [6]


def test_state_goes_through_json_in_the_middle_of_a_streak():
    book = SignatureBook([EARLY, CollapseOnset(warmup_steps=0)])
    assert judge(EARLY, similar([0.1, 0.9]), book) == []
    state = json.loads(json.dumps(book.state_dict()))
    resumed = SignatureBook([EARLY, NonFinite(), CollapseOnset(warmup_steps=0)])
    resumed.load_state_dict(state | {"a rule of old": {"raised": True, "streaks": [], "past": []}})
    (alert,) = judge(EARLY, similar([0.9], step=2), resumed)
    assert (alert.step, alert.signature) == (2, "early_oversmoothing")
    assert len(resumed.state_dict()["collapse_onset"]["past"]) == 3


def test_what_was_seen_of_another_depth_is_forgotten():
    book = SignatureBook([EARLY])
    judge(EARLY, similar([0.9]), book)
    shallow = snapshot(1, states=5, inter_token=[0.1, 0.9, 0.9, 0.1, 0.1])
    assert book.judge(shallow, BLOCKS[:4]) == ()
    assert [alert.states for alert in book.judge(replace(shallow, step=2), BLOCKS[:4])] == [(1, 2)]


@pytest.mark.parametrize(
    ("rule", "states"),
    [
        (EarlyOversmoothing(), (1, 2, 3)),  # 3 of 8 blocks
        (EarlyOversmoothing(depth=1.0), (1, 2, 3, 4)),  # those that attend
        (EarlyOversmoothing(depth=0.01, kinds=("attention",)), (1,)),
        (LateHomogenisation(), (7, 8)),
        (LateHomogenisation(depth=1.0), (5, 6, 7, 8)),
        (LateHomogenisation(depth=1.0, kinds=("recurrent", "attention")), (1, 2, 3, 4)),
    ],
)
def test_which_states_are_looked_at(rule, states):
    every = [snapshot(1000 + step, inter_token=[0.95] * 9) for step in range(3)]
    assert [alert.states for alert in judge(rule, every)] == [states]


def test_a_model_without_such_blocks_is_not_judged():
    rule = LateHomogenisation()
    blocks = tuple(replace(block, kind="attention") for block in BLOCKS)
    assert rule.read(snapshot(inter_token=[0.95] * 9), blocks, torch.empty(0, 9, dtype=torch.float64)) is None


def test_a_collapse_is_told_from_a_steady_rise_and_from_noise():
    rule, generator = CollapseOnset(warmup_steps=0), torch.Generator().manual_seed(0)
    noise = (0.3 + 0.03 * torch.randn(200, generator=generator)).tolist()
    assert judge(rule, similar(noise)) == []
    assert judge(rule, similar([0.1 + 0.8 * i / 60 for i in range(60)])) == []
    (alert,) = judge(rule, similar([*noise[:30], *[0.8] * 30]))
    assert (alert.step, alert.states) == (32, (2,))  # a level that has lasted is the new median: said once
    again = judge(rule, similar([*noise[:30], *[0.8] * 20, *noise[:30], *[0.8] * 5]))
    assert [alert.step for alert in again] == [32, 82]


def test_a_repetitive_batch_moves_all_states_and_raises_nothing():
    usual, repetitive = [0.1, *[0.3] * 8], [0.6, *[0.7] * 8]
    rows = [usual] * 12 + [repetitive] * 3 + [usual] * 3
    rule = CollapseOnset(warmup_steps=0, patience=4)
    assert judge(rule, [snapshot(i, inter_token=row) for i, row in enumerate(rows)]) == []


def test_norms_that_grow_by_a_factor_are_told_from_an_explosion():
    rule = NormExplosion()
    growth = [1.6**i for i in range(15)]
    level = [growth[-1] * (1 + 0.02 * (-1) ** i) for i in range(25)]
    healthy = [snapshot(i, norms=[1.0] * 5 + [norm] * 4) for i, norm in enumerate(growth + level)]
    assert judge(rule, healthy) == []
    bad = [snapshot(40 + i, norms=[1.0] * 5 + [10 * level[0]] * 4) for i in range(5)]
    (alert,) = judge(rule, [*healthy, *bad])
    assert (alert.step, alert.states, alert.threshold) == (41, (5, 6, 7, 8), 5.0)
    assert 9 < alert.value < 11


def test_states_that_begin_at_zero_have_not_exploded():
    norms = [[1.0] * 5 + [norm] * 4 for norm in [0.0] * 10 + [0.5] * 10]
    book = SignatureBook([NormExplosion()])
    assert judge(NormExplosion(), [snapshot(i, norms=row) for i, row in enumerate(norms)], book) == []
    past = book.state_dict()["norm_explosion"]["past"]
    assert math.isnan(past[0][8]) and past[-1][8] == math.log(0.5)


def test_a_run_of_layers_is_what_trying_every_window_finds():
    generator = torch.Generator().manual_seed(3)
    for r in (1, 3, 5):
        for _ in range(20):
            half = 0.97 + 0.03 * torch.rand(9, 9, generator=generator, dtype=torch.float64)
            cka = torch.maximum(half, half.T).fill_diagonal_(1)
            expected = [
                max(
                    min(float(cka[a, b]) for a in range(start, start + r + 1) for b in range(start, start + r + 1))
                    for start in range(9 - r)
                    if start <= state <= start + r
                )
                for state in range(9)
            ]
            rule = RedundantLayers(min_blocks=r, share=0.0)
            reading = rule.read(replace(snapshot(), cka=cka), BLOCKS, torch.empty(0, 9, dtype=torch.float64))
            assert reading is not None and reading.values.tolist() == expected


def test_a_run_takes_up_its_share_of_a_deep_model_and_a_shallow_one_is_not_judged():
    past, cka = torch.empty(0, 9, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    cka[2:8, 2:8] = 0.99  # 5 blocks
    reading = RedundantLayers().read(replace(snapshot(), cka=cka), BLOCKS, past)
    assert reading is not None and (reading.values > 0.98).nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]
    reading = RedundantLayers(share=0.75).read(replace(snapshot(), cka=cka), BLOCKS, past)
    assert reading is not None and not (reading.values > 0.98).any()
    assert RedundantLayers().read(snapshot(states=5), BLOCKS[:4], past) is None


def test_a_massive_token_is_measured_as_it_is_defined():
    model = toy.Toy()
    states = toy.record_states(model)
    with torch.no_grad():
        model.embed.weight[7] *= 100
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        toy.loss_of(model, toy.batch()).backward()
    monitor.flush()
    assert monitor.latest is not None
    reading = MassiveActivations().read(monitor.latest, (), torch.empty(0, 4, dtype=torch.float64))
    monitor.close()
    stacked = torch.stack(states).double()  # [S, B, T, D]
    largest = (stacked - stacked.mean(2, keepdim=True)).norm(dim=-1).flatten(1).amax(1)
    assert reading is not None
    torch.testing.assert_close(reading.values, largest / stacked.norm(dim=-1).flatten(1).mean(1), rtol=1e-5, atol=0)


@dataclass(frozen=True, kw_only=True)
class Shrinking(Signature):
    """A rule of one's own."""

    name: str = "shrinking"
    severity: Severity = "info"
    patience: int = 1
    warmup_steps: int = 0
    threshold: float = 0.5
    release: float = 0.4

    title: ClassVar[str] = "The last state is smaller than the first"
    reading: ClassVar[str] = "norm of state 0 relative to the last"
    suggestion: ClassVar[str] = "See whether that is meant"

    def read(self, snapshot, blocks, past):
        values = torch.full_like(snapshot.norms, torch.nan)
        values[-1] = snapshot.norms[0] / snapshot.norms[-1]
        return Reading(values=values)


def test_a_rule_of_ones_own():
    book = SignatureBook(MonitorConfig(signatures=(Shrinking(), *DEFAULT)).rules)
    small = snapshot(3, norms=[9.0] * 8 + [1.0])
    assert [alert.signature for alert in book.judge(small, BLOCKS)] == ["shrinking"]
    assert book.judged(small, BLOCKS).signatures["shrinking"] is True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: NonFinite(name="Non Finite"),
            "`NonFinite`: expected name to be of lower-case letters, digits and under",
        ),
        (lambda: NonFinite(name=""), "expected name to be of lower-case letters, digits and underscores, got ''"),
        (
            lambda: NonFinite(severity=cast(Any, "bad")),
            "expected severity to be one of 'info', 'warning', 'error', got 'bad'",
        ),
        (lambda: NonFinite(patience=0), "expected patience to be 1 snapshot or more, got 0"),
        (lambda: NonFinite(warmup_steps=-1), "expected warmup_steps to be 0 optimizer steps or more, got -1"),
        (lambda: DeadBlocks(threshold=math.nan), "expected threshold to be a finite number, got nan"),
        (lambda: DeadBlocks(threshold=0.9), "`DeadBlocks`: expected release to be at most the threshold 0.9, got"),
        (lambda: EarlyOversmoothing(depth=0), "expected depth to be above 0 and at most 1, got 0"),
        (
            lambda: EarlyOversmoothing(kinds=cast(Any, "ssm")),
            "expected kinds to be a tuple of kinds of blocks",
        ),
        (lambda: CollapseOnset(min_history=21), "expected min_history to be from 1 to 20, got 21"),
        (lambda: RedundantLayers(min_blocks=0), "expected min_blocks to be 1 block or more, got 0"),
        (lambda: RedundantLayers(share=2.0), "expected share to be from 0 to 1, got 2.0"),
        (lambda: ProbingDrop(threshold=15), "expected threshold to be from 0 to 1, got 15"),
        (lambda: judge_probing([50.0, 30.0]), "`judge_probing`: expected the accuracy of each state, from 0 to 1"),
        (lambda: judge_probing([]), "expected the accuracy of each state, from 0 to 1"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_bad_value_says_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("untyped")
def test_text_in_place_of_a_number_is_refused():
    with pytest.raises(TypeError, match="`DeadBlocks`: expected patience to be a number, got '3'"):
        DeadBlocks(patience="3")  # pyright: ignore[reportArgumentType]


def test_a_rule_without_its_texts_or_with_too_long_a_title_is_refused_at_once():
    @dataclass(frozen=True, kw_only=True)
    class Untitled(Shrinking):
        title: ClassVar[Any] = None

    @dataclass(frozen=True, kw_only=True)
    class Endless(Shrinking):
        title: ClassVar[str] = "x" * 64

    with pytest.raises(TypeError, match="`Untitled`: expected a class variable title, a text"):
        Untitled()
    with pytest.raises(ValueError, match="`Endless`: expected a title of at most 63 characters"):
        Endless()


def test_a_state_that_is_damaged_ends_monitoring_and_not_the_run():
    monitor = Monitor(toy.Toy(), MonitorConfig(every_n_steps=1))
    with pytest.warns(RepflowWarning, match="stopped monitoring"):
        monitor.load_state_dict({"signatures": {"nonfinite": 3}})
    monitor.close()
    book = SignatureBook([NonFinite()])
    book.load_state_dict({"nonfinite": {"raised": True, "of a later version": 1}})
    assert book.raised == {"nonfinite": True}


def test_titles_fit_wandb_and_names_are_unlike():
    assert all(len(rule.title) < 64 for rule in (*DEFAULT, ProbingDrop()))
    assert len({rule.name for rule in (*DEFAULT, ProbingDrop())}) == 10
    with pytest.raises(ValueError, match="a title of at most 63 characters, got 64"):
        replace(judge(EARLY, similar([0.9, 0.9]))[0], title="x" * 64)


def test_probing():
    alert = judge_probing([0.2, 0.55, math.nan, 0.6, 0.44], step=7)
    assert alert is not None
    assert (alert.step, alert.states, alert.severity, alert.threshold) == (7, (3, 4), "warning", 0.15)
    assert alert.value == pytest.approx(0.16)
    assert "0.600 at state 3 and 0.440 at the last, state 4: a drop of 0.160" in alert.message
    assert judge_probing([0.2, 0.55, 0.5]) is None
    assert judge_probing(torch.tensor([0.9, 0.5]), rule=ProbingDrop(threshold=0.5)) is None
    assert judge_probing([0.9, math.nan]) is None  # not known
