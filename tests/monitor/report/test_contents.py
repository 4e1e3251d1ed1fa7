"""What the page holds beside its figures over steps: frames, alerts, baselines, definitions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from repflow.monitor.report import write_report
from repflow.monitor.report._alerts import MAX_LISTED, alerts_of, alerts_table, marked, timeline
from repflow.monitor.report._definitions import DEFINITIONS, PAPER, definition_rows
from repflow.monitor.report._frames import CURVES, QUANTILES, UNIT, frame_indices, frames
from repflow.monitor.report._kinds import add_kind_strip, kind_pattern, segments
from repflow.monitor.report._page import render_content
from repflow.monitor.report._runs import BASELINE_COLOR, Run, load_runs
from repflow.monitor.sinks import open_run
from repflow.monitor.sum_layout import POSITION_BINS
from tests.report_page import PAGE, page_text

ALERT = {
    "step": 10,
    "signature": "collapse",
    "severity": "warning",
    "title": "Tokens collapse",
    "message": "Inter-token similarity rose to 0.85 at state 3.",
    "suggestion": "Lower the learning rate.",
    "states": [3],
}


def load(*paths: Path, baselines: tuple[Path, ...] = ()) -> list[Run]:
    return load_runs(paths, baselines)


def test_frames_hold_what_the_run_file_holds(write_run):
    path = write_run("a", ["ssm"] * 3, steps=range(0, 500, 10), ssm_blocks=[0, 2], probe=True)
    (run,), data = load(path), open_run(path)
    indices, found = frame_indices(run), frames(run)
    assert found["steps"] == data["step"].values[indices].tolist()
    for place, index in enumerate(indices):
        snapshot = data.isel(step=int(index))
        cka = [
            row + [row_below[at] for row_below in found["cka"][place][at + 1 :]]
            for at, row in enumerate(found["cka"][place])
        ]
        np.testing.assert_allclose(np.array(cka) * UNIT, snapshot["cka"], atol=UNIT / 2)
        np.testing.assert_allclose(
            np.array(found["tokens"][place]).T * UNIT, snapshot["adjacent_tokens"], atol=UNIT / 2
        )
        for name in CURVES:
            np.testing.assert_allclose(np.array(found["curves"][name][place], float), snapshot[name], rtol=1e-4)
        for name in QUANTILES:
            values = np.array(found["quantiles"][name][place], dtype=float).T
            np.testing.assert_allclose(values, snapshot[name], rtol=1e-3)


def test_positions_without_tokens_are_left_out(write_run):
    def short(parts, index):
        parts["adjacent_tokens_count"][:, 1::2] = 0  # sequences of 32 tokens

    found = frames(load(write_run(change=short))[0])
    assert len(found["positions"]) == len(found["tokens"][0]) == POSITION_BINS // 2
    assert found["positions"][1] == pytest.approx(2.5 / POSITION_BINS)


def test_frames_are_of_snapshots_with_cka(write_run):
    def every_seventh(parts, index):
        if index % 7:
            parts["hsic"].zero_()

    (run,) = load(write_run(steps=range(100), change=every_seventh))
    assert frame_indices(run).tolist() == [*range(0, 99, 7), 99]  # and the last


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [(["ssm", "ssm", "attention", "ssm"], "2S A S"), (["moe"] * 12, "12E"), (["mlp"], "M"), ([], "")],
)
def test_the_order_of_kinds_can_be_read_without_colours(kinds: list[str], pattern: str):
    assert kind_pattern(kinds) == pattern
    assert sum(count for _, count, _ in segments(kinds)) == len(kinds)


def test_letters_stand_where_there_is_room(write_run):
    (run,) = load(write_run("deep", ["ssm"] * 20 + ["attention"] + ["ssm"] * 19))
    layout: dict = {}
    add_kind_strip(layout, run, "block", along="x")
    assert len(layout["shapes"]) == 3
    assert [(letter["text"], letter["x"]) for letter in layout["annotations"]] == [("S", 9.5), ("S", 30.0)]


def test_a_file_without_a_place_for_alerts_is_not_one_without_alerts(write_run):
    (run,) = load(write_run())
    run.data.attrs.pop("alerts", None)
    assert alerts_of(run.data) is None
    assert "Alerts" not in render_content([run]).body
    run.data.attrs["alerts"] = "[]"
    assert alerts_of(run.data) == []
    assert "None: no rule was violated" in render_content([run]).body


def test_alerts_come_in_order_and_keep_their_words(write_run, tmp_path: Path, alert_runs):
    alert_runs({"a": [ALERT | {"step": 20, "value": 0.85}, ALERT]})
    (run,) = load(write_run("a"))
    first, second = alerts_of(run.data) or []
    assert (first.step, second.step) == (10, 20)
    assert first.states == (3,)
    page = write_report(write_run("a"), tmp_path / "page.html").read_text()
    for word in ("Tokens collapse", "rose to 0.85 at state 3", "Lower the learning rate."):
        assert page.count(word) > 3  # in the list, and on the figures over steps


def test_figures_without_alerts_are_left_as_they_are(write_run):
    (run,) = load(write_run())
    figure: dict = {"data": [], "layout": {}}
    assert marked(figure, [run]) is figure


def test_many_alerts_are_listed_up_to_a_limit(write_run, alert_runs):
    alert_runs({"a": [ALERT | {"step": step} for step in range(MAX_LISTED + 7)]})
    (run,) = load(write_run("a"))
    table = alerts_table([run])
    assert table.count("<tr>") == MAX_LISTED + 1
    assert "Left out of the list: 7 more." in table
    assert len(timeline([run], (0.0, 200.0))["data"][0]["x"]) == MAX_LISTED + 7


def test_drift_is_shown_of_runs_with_a_probe_batch(write_run):
    runs = load(write_run("training"), write_run("probe", probe=True))
    alone, beside = (json.loads(render_content(shown).data)["figures"] for shown in (runs[1:], runs))
    # Heatmaps and curves of the one run that has it, whatever stands beside it.
    names = [f"drift-{name}" for name in ("0-0", "1-0", "1-1", "2-0")]
    for figures in (alone, beside):
        assert [name for name in figures if name.startswith("drift")] == names
    first, last = (beside[f"drift-{group}-0"]["data"][0]["z"] for group in (0, 2))
    np.testing.assert_allclose(first, runs[1].values("drift_first").T, rtol=1e-3)
    np.testing.assert_allclose(last, runs[1].values("drift_previous").T, rtol=1e-3)
    bodies = [render_content(shown).body for shown in (runs[:1], runs[1:], runs)]
    assert ["Drift on the probe batch" in body for body in bodies] == [False, True, True]
    assert ["of a probe batch: the same at every step" in body for body in bodies] == [False, True, True]
    assert ["different kinds of batches (probe batch, training batches)" in body for body in bodies] == [
        False,
        False,
        True,
    ]


def test_drift_is_compared_where_two_runs_have_it(write_run):
    runs = load(write_run("a"), write_run("b", probe=True), write_run("c", probe=True))
    compared = {}
    for shown in (runs[:2], runs[1:], runs):
        figures = json.loads(render_content(shown).data)["figures"].values()
        found = [figure["compare"]["name"] for figure in figures if figure.get("compare", {}).get("what") == "curves"]
        compared["".join(run.label for run in shown)] = [name for name in found if "drift" in name]
    both = ["drift_first", "drift_previous"]
    assert compared == {"ab": [], "bc": both, "abc": both}


def test_drift_that_was_not_measured_is_said(write_run):
    """As without the metric `cka`."""

    def nothing(parts, index):
        parts["drift_hsic"].zero_()

    content = render_content(load(write_run(probe=True, change=nothing)))
    assert content.body.count("not measured</small>") == 2
    assert json.loads(content.data)["figures"]["drift-0-0"]["data"][0]["z"][0] == [None] * 3


def test_a_baseline_is_drawn_by_its_first_snapshot_beside_the_runs(write_run, tmp_path: Path):
    runs = load(write_run("trained", steps=(100, 200)), baselines=(write_run("random", steps=(0, 50)),))
    assert [(run.label, run.baseline) for run in runs] == [("trained", False), ("random", True)]
    content = render_content(runs)
    assert "No run holds step 0" in content.body
    assert "Grey: baselines" in content.body
    assert content.data.count(f'"color":"{BASELINE_COLOR}"') == 4  # states, updates, adjacent, norms
    assert '"step":0' in content.data and '"50"' not in content.data


def test_a_baseline_of_another_depth_brings_relative_depth(write_run):
    runs = load(write_run("a"), baselines=(write_run("b", ["ssm"] * 7),))
    assert "relative depth" in render_content(runs).data
    assert "relative depth" not in render_content(runs[:1]).data


def test_an_output_that_is_a_baseline_is_refused(write_run):
    path = write_run()
    with pytest.raises(ValueError, match="is one of the run files"):
        write_report(write_run(), path, baselines=path)


def test_every_quantity_of_a_run_file_has_a_definition(write_run):
    data = open_run(write_run(ssm_blocks=[2], probe=True))
    told_elsewhere = {"time", "tokens", "sequences", "loss", "local_variance", "ssm_nonfinite"}
    assert set(map(str, data.data_vars)) - told_elsewhere == set(DEFINITIONS)
    content = render_content(load(write_run("a", ssm_blocks=[2], probe=True))).body
    for name in DEFINITIONS:
        assert content.count(f'id="define-{name}"') == 1


def test_definitions_are_whole():
    for definition in DEFINITIONS.values():
        assert definition.formula.endswith(".") and definition.reading.endswith(".") and definition.advice.endswith(".")
        assert definition.unit
        assert (PAPER in dict(definition_rows(definition)).get("Paper", "")) == bool(definition.source)


def test_the_docs_link_to_what_the_page_defines():
    assert PAGE.read_text() == page_text()
    for image in re.findall(r"\]\((images/[^)]+)\)", page_text()):
        assert (PAGE.parent / image).exists()


def test_a_long_run_of_a_deep_model_gives_a_page_of_bounded_size(write_run):
    noise = torch.Generator().manual_seed(0)

    def noisy(parts, index):
        for name in ("inter_token", "adjacent", "adjacent_tokens", "norms", "hsic"):
            parts[name].mul_(torch.rand(parts[name].shape, generator=noise, dtype=torch.float64))

    (run,) = load(write_run("long", ["ssm"] * 64, steps=range(320), change=noisy))
    content = render_content([run])
    assert len(content.data) < 3_000_000
    assert "Shown are 300 columns of 320 snapshots" in content.body
    assert "Shown are 30 maps of 320 snapshots" in content.body


def test_alerts_are_read_from_any_dataset():
    assert alerts_of(xr.Dataset()) is None
