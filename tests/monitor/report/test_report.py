"""The page as text: complete, safe, and honest about what is missing."""

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from repflow.monitor import RepflowWarning
from repflow.monitor.report import write_report
from repflow.monitor.report._kinds import KIND_COLORS
from repflow.monitor.report._page import script_json

VOID = {"meta", "link", "input", "br", "path"}
FETCHING = {"src", "srcset", "poster", "data", "action", "background", "xlink:href"}
SCRIPTS = ("theme", "data", "plotly", "page")
HOSTILE = "</script><script>window.broken=1</script><img src=x onerror=alert(1)>&amp;\"'%{x}"


class Page(HTMLParser):
    """Checks that tags nest, and keeps what a browser would fetch, the scripts, and the text that is shown."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.fetched += [value for name, value in attrs if name in FETCHING and value]
        if tag == "link":
            self.fetched += [
                value for name, value in attrs if name == "href" and value and not value.startswith("data:")
            ]
        if tag in self.raw:
            self.raw[tag].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]][-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        """What the page draws, and what its slider runs through."""
        return json.loads(self.raw["script"][SCRIPTS.index("data")])

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        return self.data["figures"]

    def plot_labels(self) -> dict[str, str]:
        """The accessible name of every figure -> its id."""
        return {
            str(attrs["aria-label"]): str(attrs["id"])
            for _, attrs in self.tags
            if "plot" in str(attrs.get("class")).split()
        }

    def figure(self, label: str) -> dict[str, Any]:
        return self.figures[self.plot_labels()[label]]


@pytest.fixture
def render(tmp_path: Path) -> Callable[[Sequence[Path]], Page]:
    return lambda paths: Page(write_report(paths, tmp_path / "out" / "report.html"))


def test_a_page_has_every_quantity_of_every_run(write_run, render):
    page = render([write_run("tbm", ["attention"] * 4), write_run("ssm", ["ssm"] * 6)])
    for title in ("Inter-token similarity", "Adjacent-layer similarity", "CKA of every", "Norms", "Loss", "Health"):
        assert title in page.text
    labels = page.plot_labels()
    for run in ("tbm", "ssm"):
        assert len([label for label in labels if label.endswith(f": {run}")]) == 9
    assert sorted(labels.values()) == sorted(page.figures)


def test_every_figure_is_one_that_plotly_accepts(write_run, render):
    for figure in render([write_run("a"), write_run("b", ["moe"] * 20)]).figures.values():
        go.Figure({"data": figure["data"], "layout": figure["layout"]})


def test_nothing_is_fetched(write_run, render):
    page = render([write_run()])
    assert page.fetched == []
    assert not re.search(r"url\(|@import", page.raw["style"][0])


def test_values_are_those_of_the_run_file(write_run, render):
    page = render([write_run("a", ["ssm"] * 4, steps=[0, 5, 15])])
    trace = page.figure("Inter-token similarity, depth by step: a")["data"][0]
    assert trace["x"] == [0, 5, 15]
    assert [row[0] for row in trace["z"]] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
    assert trace["z"][4][2] == pytest.approx(0.85)
    assert "0.150\u00a0→\u00a00.450state 2" in page.text  # the middle state
    assert "4.00\u00a0→\u00a01.33" in page.text  # loss


def test_runs_share_their_scales(write_run, render):
    def larger(parts, index):
        parts["inter_token"].mul_(0.5)
        parts["norms"].mul_(3.0)

    page = render([write_run("a", ["ssm"] * 3), write_run("b", ["ssm"] * 8, steps=range(0, 100, 20), change=larger)])
    labels = [label for label in page.plot_labels() if label.endswith((": a", ": b"))]
    assert len(labels) == 18
    for label in labels:
        one, other = page.figure(label[:-1] + "a"), page.figure(label[:-1] + "b")
        for bound in ("zmin", "zmax"):
            assert one["data"][0].get(bound) == other["data"][0].get(bound)
        if one["data"][0]["type"] == "heatmap" and "frame" not in one:
            assert one["layout"]["xaxis"]["range"] == other["layout"]["xaxis"]["range"]
        if one["data"][0]["type"] == "scatter":
            assert one["layout"]["yaxis"] == other["layout"]["yaxis"]


def test_what_was_not_measured_is_a_gap(write_run, render):
    def lost(parts, index):
        parts["inter_token_groups"][1] = index != 1
        parts["nonfinite"][1] = 7 * (index == 1)

    page = render([write_run("a", change=lost)])
    row = page.figure("Inter-token similarity, depth by step: a")["data"][0]["z"][1]
    assert row[1] is None
    assert None not in (row[0], row[2])
    assert "in 1 of 3 snapshots, first at step 10; state 1; up to 7 tokens of a state" in page.text


def test_a_block_that_rewrites_the_stream_leaves_colours_for_the_others(write_run, render):
    def rewriting(parts, index):
        parts["adjacent"][0] = 512 * 0.01

    page = render([write_run("a", ["ssm"] * 10, change=rewriting)])
    trace = page.figure("Adjacent-layer similarity, depth by step: a")["data"][0]
    assert trace["z"][0] == [0.01] * 3
    assert trace["zmin"] > 0.7
    assert "≤ 0.7" in page.text
    overlay = page.figure("Adjacent-layer similarity, curves over depth: Chosen step")
    assert "type" not in overlay["layout"]["yaxis"]  # a cosine is never on a logarithmic axis


def test_kinds_of_blocks_are_marked_where_they_work(write_run, render):
    page = render([write_run("a", ["ssm", "attention", "ssm"])])
    strip = page.figure("Norms, curves over depth: a")["layout"]["shapes"]
    assert [(shape["x0"], shape["x1"]) for shape in strip] == [(0, 1), (1, 2), (2, 3)]
    assert strip[0]["fillcolor"] == strip[2]["fillcolor"] != strip[1]["fillcolor"]
    blocks = page.figure("Adjacent-layer similarity, depth by step: a")["layout"]["shapes"]
    assert [(shape["y0"], shape["y1"]) for shape in blocks] == [(-0.5, 0.5), (0.5, 1.5), (1.5, 2.5)]
    assert "2 ssm, 1 attention" in page.text


def test_hostile_names_stay_text(write_run, render):
    path = write_run(
        HOSTILE, [HOSTILE, "ssm"], block_name=HOSTILE, scalars=lambda index: {"loss": 1.0, HOSTILE: 2.0}, file="a.db"
    )
    page = render([path])
    assert len(page.raw["script"]) == len(SCRIPTS)
    assert HOSTILE in page.text
    assert not [attrs for tag, attrs in page.tags if tag == "img" or any(name.startswith("on") for name in attrs)]
    drawn = [(figure["data"], figure["layout"]) for figure in page.figures.values()]
    assert "<script" not in json.dumps(drawn)  # escaped for Plotly's own markup too


def test_json_in_a_script_element_cannot_end_it():
    value = {"</script>": "<!-- & -->"}
    text = script_json(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


def test_a_run_without_snapshots_is_named(write_run, render):
    page = render([write_run("full"), write_run("void", steps=[])])
    assert "No snapshot has been written yet by: void." in page.text
    assert not [label for label in page.plot_labels() if label.endswith(": void")]


def test_only_runs_without_snapshots(write_run, render):
    page = render([write_run("void", steps=[])])
    assert "no snapshot yet" in page.text
    assert page.figures == {}


def test_runs_of_one_name_are_told_apart(write_run, render):
    paths = [write_run("same", file="one/x.db"), write_run("same", file="two/x.db"), write_run("other")]
    labels = " ".join(render(paths).plot_labels())
    assert "same (one/x.db)" in labels
    assert "same (two/x.db)" in labels
    assert "other (" not in labels


def test_the_same_file_twice_is_shown_twice(write_run, render):
    path = write_run("same")
    text = render([path, path]).text
    assert f"same ({path.name}) #1" in text
    assert f"same ({path.name}) #2" in text


def test_many_snapshots_are_thinned_and_that_is_said(write_run, render):
    def spike(parts, index):
        parts["fourth_moment_max"][2] = 0.9 if index == 333 else 0.1

    page = render([write_run("long", steps=range(700), change=spike)])
    trace = page.figure("Inter-token similarity, depth by step: long")["data"][0]
    assert len(trace["x"]) == 300
    assert (trace["x"][0], trace["x"][-1]) == (0, 699)
    frames = page.data["runs"]["0"]
    assert len(frames["steps"]) == len(frames["cka"]) == len(frames["tokens"]) == 30
    assert (frames["steps"][0], frames["steps"][-1]) == (0, 699)
    assert "Shown are 300 columns of 700 snapshots" in page.text
    assert "Shown are 30 matrices of 700 snapshots" in page.text
    assert max(page.figure("Health, depth by step: long")["data"][0]["z"][2]) == 0.9  # maxima survive


def test_different_estimators_are_warned_of(write_run, render):
    page = render([write_run("a"), write_run("b", estimator="biased")])
    assert "different CKA estimators (biased, unbiased)" in page.text


def test_cka_that_was_not_measured(write_run, render):
    def without(parts, index):
        parts["hsic"].fill_(0.0)

    page = render([write_run("a", change=without)])
    assert "unbiased estimator, not measured" in page.text
    assert page.data["runs"]["0"]["steps"] == [0, 10, 20]  # for what else the slider runs through
    assert page.data["runs"]["0"]["cka"][0][0] == [None]


def test_a_loss_that_is_missing_at_the_last_step_says_which_it_shows(write_run, render):
    page = render([write_run("a", scalars=lambda index: {"train_loss": 2.0 - index} if index < 2 else {})])
    assert "2.00\u00a0→\u00a01.00 (step 10)" in page.text
    assert page.figure("Loss and other logged values, over steps: train_loss")["data"][0]["y"] == [2.0, 1.0, None]


def test_a_damaged_file_is_shown_as_far_as_it_is_whole_with_a_warning(write_run, render):
    path = write_run("cut", ["ssm"] * 12, steps=range(60))
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.warns(RepflowWarning) as caught:
        page = render([path])
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(f"repflow: {path}: damaged")
    assert message.removeprefix("repflow: ") in page.text
    assert page.figures


def test_no_paths():
    with pytest.raises(ValueError, match="at least one run file"):
        write_report([], "report.html")


def test_every_unreadable_path_is_named_and_nothing_is_written(write_run, tmp_path):
    good, text, absent = write_run(), tmp_path / "notes.txt", tmp_path / "absent.db"
    text.write_text("not a run file")
    output = tmp_path / "report.html"
    with pytest.raises(ValueError, match="2 of 3 paths") as caught:
        write_report([text, good, absent], output)
    assert str(text) in str(caught.value)
    assert str(absent) in str(caught.value)
    assert "the other 1 can be read" in str(caught.value)
    assert not output.exists()


@pytest.mark.parametrize("place", ["directory", "file/report.html"])
def test_an_output_that_cannot_be_written(write_run, tmp_path, place):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the report to .*give another output"):
        write_report([write_run()], tmp_path / place)
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_file_is_never_overwritten(write_run):
    path = write_run()
    with pytest.raises(ValueError, match="is one of the run files"):
        write_report([path], path)
    assert path.read_bytes().startswith(b"SQLite format 3")


MAP = "Inter-token similarity, depth by step: "


def cells(page: Page, label: str) -> tuple[list[float], list[bool]]:
    """Borders of a heatmap's columns as Plotly draws them, halfway between places; and which columns hold values."""
    trace = page.figure(label)["data"][0]
    x = trace["x"]
    between = [(one + other) / 2 for one, other in pairwise(x)]
    borders = [2 * x[0] - between[0], *between, 2 * x[-1] - between[-1]]
    return borders, [value is not None for value in trace["z"][0]]


def test_no_column_is_painted_over_a_gap(write_run, render):
    page = render([write_run("a", steps=[0, 50, 100, 10_000])])
    borders, filled = cells(page, MAP + "a")
    assert filled == [True, True, True, False, False, True]
    assert borders[:4] == [-25, 25, 75, 125]
    assert borders[-2:] == [9_975, 10_025]
    assert page.figure(MAP + "a")["layout"]["xaxis"]["range"] == [-25, 10_025]


def test_one_missing_snapshot_is_one_empty_column(write_run, render):
    borders, filled = cells(render([write_run("a", steps=[0, 10, 20, 40, 50])]), MAP + "a")
    assert borders == [-5, 5, 15, 25, 35, 45, 55]
    assert filled == [True, True, True, False, True, True]


def test_snapshots_that_are_not_shown_leave_no_empty_columns(write_run, render):
    _, filled = cells(render([write_run("a", steps=range(301))]), MAP + "a")
    assert filled == [True] * 300


def test_a_single_snapshot_can_be_seen_beside_a_long_run(write_run, render):
    page = render([write_run("long", steps=range(0, 20_001, 1_000)), write_run("one", steps=[5_000])])
    borders, filled = cells(page, MAP + "one")
    assert filled == [False, True, False]
    low, high = page.figure(MAP + "one")["layout"]["xaxis"]["range"]
    assert borders[2] - borders[1] > 0.015 * (high - low)
    assert (borders[1] + borders[2]) / 2 == 5_000


def test_a_run_of_one_snapshot_is_told_so(write_run, render):
    text = render([write_run("a", steps=[5])]).text
    assert "1 snapshot, step 5; 512 tokens in 8 sequences; written" in text


def test_lists_of_steps_have_one_kind_of_comma(write_run, render):
    assert "steps 0 · 1,200 · 2,400" in render([write_run("a", steps=[0, 1_200, 2_400])]).text


def test_more_runs_than_colours_differ_in_their_dashes(write_run, render):
    page = render([write_run(f"run {index}", ["conv"], steps=[0]) for index in range(9)])
    lines = [(attrs["stroke"], attrs["stroke-dasharray"]) for tag, attrs in page.tags if tag == "path"]
    cards = set(lines[:9])
    assert len(cards) == 9
    assert {color for color, _ in set(lines) - cards} == {"currentColor"}  # all panels have those of the cards


def test_kinds_that_are_found_have_colours_of_their_own():
    assert not {"attention", "ssm", "recurrent", "conv", "mlp", "moe", "hybrid"} - KIND_COLORS.keys()
    assert len(set(KIND_COLORS.values())) == len(KIND_COLORS)


def test_small_values_have_no_unit_prefixes(write_run, render):
    page = render([write_run("a", scalars=lambda index: {"lr": 2e-4 * (1 + index)})])
    assert page.figure("Loss and other logged values, over steps: lr")["layout"]["yaxis"]["exponentformat"] == "e"


def test_one_path_needs_no_list(write_run, tmp_path):
    path = write_run("a")
    pages = [write_report(paths, tmp_path / "page.html").read_text() for paths in (str(path), path, [path])]
    assert pages[0] == pages[1] == pages[2]
    with pytest.raises(ValueError, match="is one of the run files"):
        write_report(path, path)
