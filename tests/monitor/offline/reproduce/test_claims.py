"""Claims and the paper's values, on curves made by hand."""

import math
from typing import Any

import numpy as np
import pytest

from repflow.monitor.offline.reproduce.claims import claims_of
from repflow.monitor.offline.reproduce.paper import (
    beside,
    compare_curves,
    compare_matrices,
    compare_random,
    compare_table,
    paper_model,
    paper_values,
)


def rows(model: str, family: str, *curves: list[float | None], **choice: Any) -> list[dict[str, Any]]:
    chosen = {"scheme": "gaussian", "policy": "scheme", "norms": "baseline", "embedding_scale": 1.0} | choice
    return [
        {"model": model, "family": family, **chosen, "seed": seed, "state": state, "value": value}
        for seed, curve in enumerate(curves)
        for state, value in enumerate(curve)
    ]


def verdicts(claim: dict[str, Any]) -> list[Any]:
    return [verdict["holds"] for verdict in claim["verdicts"]]


def test_figure_3():
    made = [
        *rows("high", "TBM", [0.0, 0.9, 0.9, 0.7, 0.9], [0.0, 0.9, 0.9, 0.95, 0.9]),  # means .825
        *rows("late", "TBM", [0.0, 0.7, 0.9, 0.9, 0.9]),
        *rows("gap", "TBM", [0.0, 0.9, 0.9, 0.9, None]),
        *rows("near", "SSM", [0.0, 0.05, -0.05, 0.1, 0.0]),
        *rows("far", "SSM", [0.0, -0.2, 0.0, 0.0, 0.0]),
    ]
    rises, stays, ordered = claims_of("figure3", made)
    assert verdicts(rises) == [True, False, None]
    assert rises["verdicts"][0]["value"] == pytest.approx(0.825)
    assert verdicts(stays) == [True, False]
    assert stays["verdicts"][1]["value"] == -0.2
    assert verdicts(ordered) == [None]  # one of the transformers has a gap
    complete = [row for row in made if row["model"] != "gap"]
    (verdict,) = claims_of("figure3", complete)[2]["verdicts"]
    assert verdict["holds"] is True
    assert verdict["value"] == pytest.approx(0.68 - 0.02)  # the lowest transformer, the highest state-space model


def test_figure_6():
    def claims(baseline: float, disabled: float, reset: float) -> list[Any]:
        made = rows("t", "TBM", [baseline] * 3) + rows("t", "TBM", [disabled] * 3, norms="disabled")
        made += rows("t", "TBM", [reset] * 3, norms="affine_reset") + rows("s", "SSM", [0.0] * 3)
        return [verdicts(claim) for claim in claims_of("figure6", made)]

    ordered = [True, None, None]  # with norms only are there both families
    assert claims(0.8, 0.1, 0.4) == [[True], [True], ordered]
    assert claims(0.8, 0.5, 0.4) == [[False], [False], ordered]
    assert claims(0.8, 0.4, 0.8) == [[True], [False], ordered]


def test_figure_7_is_judged_at_each_scale():
    made = [row for scale in (0.5, 2.0) for row in rows("t", "TBM", [scale / 2] * 2, embedding_scale=scale)]
    made += [row for scale in (0.5, 2.0) for row in rows("s", "SSM", [0.5] * 2, embedding_scale=scale)]
    (claim,) = claims_of("figure7", made)
    assert [(verdict["embedding_scale"], verdict["holds"]) for verdict in claim["verdicts"]] == [
        (0.5, False),
        (2, True),
    ]


def test_without_both_families_nothing_is_said_of_their_order():
    assert verdicts(claims_of("figure5", rows("t", "TBM", [0.5, 0.5]))[0]) == [None]


def test_the_difference_is_ours_minus_the_papers():
    assert beside(0.9, 0.75)["difference"] == pytest.approx(-0.15)
    assert [beside([0.8, 1.0], ours)["difference"] for ours in (0.7, 0.9, 1.1)] == pytest.approx([-0.1, 0, 0.1])
    assert beside(0.9, None) == {"paper": 0.9, "ours": None, "difference": None}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("EleutherAI/gpt-neo-2.7B", "gpt-neo-2.7b"),
        ("state-spaces/mamba-2.8b-hf", "mamba-2.8b"),
        ("/somewhere/pythia-2.8b", "pythia-2.8b"),
        ("EleutherAI/pythia-410m", None),
    ],
)
def test_which_model_of_the_paper_it_is(name: str, expected: str | None):
    assert paper_model(name) == expected


def test_values_of_figures():
    curve: list[float | None] = [0.3 + 0.01 * step for step in range(64)]
    found = compare_curves("figure1", {"mamba2-2.7b": curve, "another": curve})
    assert [row["model"] for row in found] == ["mamba2-2.7b"] * 2
    assert found[0]["ours"] == pytest.approx(0.55)  # the median of the first 51
    assert found[0]["difference"] == pytest.approx(0.15)  # above 20–40 %
    assert found[1]["ours"] == pytest.approx(0.93) and found[1]["paper"] == 0.8
    matrix = np.eye(33) + 0.5 * (1 - np.eye(33))
    assert [row["difference"] for row in compare_matrices("figure4", {"gpt-neo-2.7b": matrix})] == pytest.approx(
        [-0.4, -0.3]
    )
    made = rows("pythia-2.8b", "TBM", [0.0, 0.7], [0.0, 0.8]) + rows("pythia-2.8b", "TBM", [0.0, 0.1], scheme="default")
    (row,) = compare_random("figure3", made)
    assert (row["scheme"], row["ours"]) == ("gaussian", pytest.approx(0.75))
    assert row["difference"] == pytest.approx(-0.05)


def test_values_of_tables():
    measured = [{"model": "pythia-2.8b", "length": length, "v_loc": 0.3, "v_glob": None} for length in (2048, 4096)]
    loc, glob = compare_table("table2", measured, ("v_loc", "v_glob"))
    assert (loc["paper"], glob["paper"], glob["difference"]) == (0.280, 1.147, None)
    assert math.isclose(loc["difference"], 0.02)


def test_the_papers_tables_are_whole():
    """18 rows each: transformers up to 2K, state-space models up to 4K."""
    for table in ("table1", "table2"):
        keys = {(row["model"], row["length"]) for row in paper_values()[table]["rows"]}
        assert len(keys) == len(paper_values()[table]["rows"]) == 2 * 3 + 3 * 4
