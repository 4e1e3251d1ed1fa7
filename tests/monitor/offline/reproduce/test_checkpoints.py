"""Figures 1, 2 and 4 and tables 1 and 2 of checkpoints: what is written is what the extraction found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from repflow.monitor.functional import adjacent_layer_similarity
from repflow.monitor.offline.extracted import Extraction
from repflow.monitor.offline.loading import load_model
from repflow.monitor.offline.probing import ProbeOptions, train_probes
from repflow.monitor.offline.reproduce.written import Result, read_result
from repflow.monitor.offline.tasks_kvpr import KeyValueRetrieval
from tests.monitor.offline import questions, tiny
from tests.monitor.offline.reproduce.conftest import reproduce, trained


def result(folder: Path, target: str) -> Result:
    found = read_result(folder, target)
    assert found is not None
    return found


def extraction(folder: Path, model: str, task: str) -> Extraction:
    (place,) = (folder / "work" / "prompts").glob(f"{model}-{task}-300-*/*")
    return Extraction.open(place / "extraction")


def test_one_extraction_serves_all_targets(checkpoints: Path):
    names = {path.name.rsplit("-", 1)[0] for path in (checkpoints / "work" / "prompts").iterdir()}
    assert names == {f"{model}-{task}-300" for model in ("gpt_neox", "mamba2") for task in ("kvpr", "mdqa")}


@pytest.mark.parametrize(("target", "name"), [("figure1", "adjacent"), ("figure2", "inter_token")])
def test_curves(target: str, name: str, checkpoints: Path):
    for model in ("gpt_neox", "mamba2"):
        chosen = {"model": model, "task": "mdqa", "length": 300}
        found = [row["value"] for row in result(checkpoints, target).rows if chosen.items() <= row.items()]
        expected = getattr(extraction(checkpoints, model, "mdqa").snapshot, name)
        assert found == pytest.approx(expected.tolist(), rel=1e-6)


def test_the_map_of_a_prompt_is_that_of_its_tokens(checkpoints: Path, models: Path):
    arrays = result(checkpoints, "figure1").arrays
    items = result(checkpoints, "figure1").about["models"]["gpt_neox/kvpr/300"]["items"]
    ids = torch.tensor([tiny.tokenizer()(KeyValueRetrieval(items=items).sample(0).prompt)["input_ids"]])
    model = load_model(str(models / "gpt_neox")).model
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    # The last entry of transformers is after the final norm: all others are as they are here.
    expected = adjacent_layer_similarity(torch.stack(hidden[:-1]))[:, 0]
    assert np.allclose(arrays["gpt_neox/kvpr/300/tokens"][:-1], expected, atol=1e-5)
    assert arrays["gpt_neox/kvpr/300/positions"].shape == (3, 64)


def test_matrices_and_their_mean(checkpoints: Path):
    arrays = result(checkpoints, "figure4").arrays
    parts = [arrays[f"mamba2/{task}/300"] for task in ("kvpr", "mdqa")]
    assert np.allclose(parts[0], extraction(checkpoints, "mamba2", "kvpr").snapshot.cka, atol=1e-6)
    assert np.allclose(arrays["mamba2/mean/300"], np.mean(parts, axis=0))


@pytest.mark.parametrize("figure", ["figure3", "figure5"])
def test_the_checkpoint_stands_beside_models_drawn_at_random(figure: str, checkpoints: Path):
    rows = [row for row in result(checkpoints, figure).rows if row["scheme"] == "pretrained"]
    name = "update_inter_token" if figure == "figure5" else "inter_token"
    for model, family in (("gpt_neox", "TBM"), ("mamba2", "SSM")):
        curves = [getattr(extraction(checkpoints, model, task).snapshot, name) for task in ("kvpr", "mdqa")]
        found = [row["value"] for row in rows if row["model"] == model and row["family"] == family]
        assert found == pytest.approx(torch.stack(curves).mean(0).tolist(), rel=1e-6)


def test_table_1_is_what_probes_find(checkpoints: Path):
    written = result(checkpoints, "table1")
    source = extraction(checkpoints, "gpt_neox", "kvpr")
    options = ProbeOptions.of("paper", seeds=(0, 1))
    expected = train_probes(source.features, 4, source.labels, source.contexts, options)
    assert np.array_equal(written.arrays["gpt_neox/kvpr/300"], expected.accuracy)
    row, other, mean = (row for row in written.rows if row["model"] == "gpt_neox")
    assert row["last"] == pytest.approx(100 * float(expected.mean[-1]))
    assert row["drop"] == pytest.approx(100 * expected.drop, abs=1e-6)
    assert (row["peak_state"], row["samples"], row["classes"]) == (expected.peak, 44, expected.classes)
    assert (mean["task"], mean["last"]) == ("mean", pytest.approx((row["last"] + other["last"]) / 2))


@pytest.mark.parametrize(("given", "states"), [((), "hf"), (("--states", "residual"), "residual")])
def test_the_released_protocol_is_whole(models: Path, tmp_path: Path, given: tuple[str, ...], states: str):
    """With its last layer, and each context at every position; how many there are is told."""
    reproduce(
        *("table1", *trained(models, "gpt_neox"), "--task", "kvpr", "--probes", "released", *given),
        *("--no-pictures", "-o", tmp_path),
    )
    written = result(tmp_path, "table1")
    measured = written.about["models"]["gpt_neox/kvpr/300"]
    assert (measured["states"], measured["crossed"]) == (states, True)
    assert written.about["choices"]["states"].startswith(f"{states}: ")
    row = written.rows[0]
    assert (row["samples"], row["contexts"] * row["classes"]) == (44, 44)
    assert row["chance"] == pytest.approx(100 / row["classes"])


def test_table_2_is_what_the_snapshot_has(checkpoints: Path):
    row = result(checkpoints, "table2").rows[1]
    snapshot = extraction(checkpoints, "gpt_neox", "mdqa").snapshot
    assert [row["v_loc"], row["v_glob"]] == pytest.approx([float(snapshot.v_loc), float(snapshot.v_glob)], rel=1e-6)


def test_every_choice_is_stated(checkpoints: Path):
    stated = json.loads((checkpoints / "table1.json").read_text())
    assert stated["choices"]["probes"]["learning_rate"] == 0.05
    measured = stated["models"]["mamba2/kvpr/300"]
    expected = {
        "states": "residual",
        "cka_estimator": "unbiased",
        "samples": 44,
        "weights": "pretrained",
        "device": "cpu",
    }
    assert expected.items() <= measured.items()
    assert len(measured["tokens_min_mean_max"]) == 3
    assert measured["positions"] and measured["weights_hash"] and measured["versions"]["torch"] == torch.__version__


def test_a_damaged_cache_is_measured_again(models: Path, tmp_path: Path):
    arguments = ["figure2", *trained(models, "gpt_neo"), "--task", "kvpr", "--no-pictures", "-o", tmp_path]
    reproduce(*arguments)
    whole = (tmp_path / "figure2.csv").read_bytes()
    (place,) = (tmp_path / "work" / "prompts").glob("*/*")
    for name in ("extraction/000000.pt", "extraction/samples.pt", "extraction/extraction.json", "token_map.npy"):
        (place / name).write_bytes(b"nothing")
        (tmp_path / "figure2.json").write_text("{")
        with pytest.warns(RuntimeWarning, match=rf"{place / name} is damaged"):
            assert "44 prompts" in reproduce(*arguments)
        assert (tmp_path / "figure2.csv").read_bytes() == whole


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a name in the paper, with room for 2K tokens, and questions with passages that fill them."""
    folder = tmp_path_factory.mktemp("named")
    tiny.save(folder / "pythia-2.8b", "gpt_neox", max_position_embeddings=2048)
    records = questions.records()
    for record in records:
        record["ctxs"][1]["text"] *= 5  # pyright: ignore[reportIndexIssue]
    questions.write(folder / "questions.jsonl", list(records))
    return folder


def of_the_paper(named: Path, *arguments: str | Path) -> list[str | Path]:
    """Arguments for few prompts on the checkpoint of a name in the paper."""
    chosen = ("--model", named / "pythia-2.8b", "--data", named / "questions.jsonl", "--samples", "2")
    return [*arguments, *chosen, "--no-pictures", "-o", named / "out"]  # one folder: what is measured is shared


def test_the_paper_stands_beside_a_model_of_its_name(named: Path):
    lengths = ("--length", "2K", "--length", "300")
    reproduce(*of_the_paper(named, "figure2", "figure4", "table2", *lengths))
    figure = result(named / "out", "figure2")
    assert [row["paper"] for row in figure.about["comparison"]] == [0.9, 0.6]
    last = [row["value"] for row in figure.rows if row["length"] == 2048 and row["state"] == 3]
    assert len(last) == 2  # one for each task; those of 300 tokens are not what the paper's figure is about
    assert figure.about["comparison"][1]["ours"] == pytest.approx(np.mean(last), rel=1e-6)
    assert figure.about["reading"].startswith("What is said of most layers is held against the median over all states.")
    matrices = result(named / "out", "figure4")
    (beside,) = matrices.about["comparison"]
    assert beside["ours"] == pytest.approx(float(matrices.arrays["pythia-2.8b/mean/2048"][1, 2]), rel=1e-6)
    table = result(named / "out", "table2")
    long_loc, long_glob, loc, glob = table.about["comparison"]
    assert [(told["length"], told["paper"]) for told in (long_loc, long_glob)] == [(2048, 0.28), (2048, 1.147)]
    assert [(told["length"], told["paper"]) for told in (loc, glob)] == [(300, 0.265), (300, 1.059)]
    mean = next(row for row in table.rows if row["task"] == "mean" and row["length"] == 300)
    assert loc["difference"] == pytest.approx(mean["v_loc"] - 0.265, rel=1e-5)


@pytest.mark.parametrize(
    "choice",
    [
        ("--length", "2K", "--task", "kvpr"),  # its numbers are means over both tasks
        ("--length", "300"),  # its figures are of 2K
        ("--length", "2K", "--protocol", "random_ids"),
        ("--length", "2K", "--init", "--tokenizer"),  # weights of its own
    ],
    ids=["one task", "another length", "random ids", "random weights"],
)
def test_nothing_else_stands_beside_the_paper(choice: tuple[str, ...], named: Path):
    arguments = [*choice, named / "pythia-2.8b"] if choice[-1] == "--tokenizer" else list(choice)
    reproduce(*of_the_paper(named, "figure2", "figure4", "table2", *arguments))
    beside = {target: result(named / "out", target).about["comparison"] for target in ("figure2", "figure4", "table2")}
    assert not beside["figure2"] and not beside["figure4"]
    assert len(beside["table2"]) == (2 if choice == ("--length", "300") else 0)


def test_a_length_beyond_the_window_is_skipped_and_said(models: Path, tmp_path: Path):
    output = reproduce(
        *("table2", "--init", "--model", models / "gpt_neo", "--length", "64", "--length", "1K"),
        *("--no-pictures", "-o", tmp_path),
    )
    assert "skipped 1,024 tokens: the model's window is 512" in output
    written = result(tmp_path, "table2")
    assert {(row["task"], row["length"]) for row in written.rows} == {("random_ids", 64)}
    assert written.about["comparison"] == [] and len(written.about["skipped"]) == 1


def test_a_task_that_does_not_fit_is_skipped_and_said(models: Path, tmp_path: Path):
    questions.write_long(tmp_path / "long.jsonl")
    arguments = ("--model", models / "gpt_neo", "--length", "300", "--samples", "11", "--data", tmp_path / "long.jsonl")
    output = reproduce("table2", *arguments, "--no-pictures", "-o", tmp_path / "out")
    assert "skipped 300 tokens of mdqa: expected 2 documents to fit into 512, the window of the model" in output
    written = result(tmp_path / "out", "table2")
    assert [row["task"] for row in written.rows] == ["kvpr"]  # no mean of one task
    assert len(written.about["skipped"]) == 1


def test_models_of_one_name_are_told_apart(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By their paths, whose slashes names on the hub have too."""
    monkeypatch.chdir(tmp_path)
    for folder, kind in (("one", "gpt_neox"), ("two", "gpt_neo")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model").symlink_to(models / kind)
    reproduce("figure4", "table1", "--model", "one/model", "--model", "two/model", *trained(models), "--task", "kvpr",
              "-o", "out")  # fmt: skip
    assert {row["model"] for row in result(tmp_path / "out", "table1").rows} == {"one/model", "two/model"}
    assert result(tmp_path / "out", "figure4").arrays.keys() == {"one/model/kvpr/300", "two/model/kvpr/300"}
    assert (tmp_path / "out" / "table1.svg").exists()
