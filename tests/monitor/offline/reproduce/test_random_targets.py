"""Figures 3, 5, 6 and 7: what is written is what a single stream gives, and a stopped run goes on."""

import html
import json
import re
from pathlib import Path

import pytest
import transformers

from repflow.monitor.offline.initialisation import Initialisation
from repflow.monitor.offline.random_streams import random_stream
from repflow.monitor.offline.reproduce.written import read_result
from tests.monitor.offline import tiny
from tests.monitor.offline.reproduce.conftest import reproduce

FIGURES = ("figure3", "figure5", "figure6", "figure7")


@pytest.mark.parametrize("figure", FIGURES)
def test_every_choice_has_its_rows(figure: str, drawn: Path):
    result = read_result(drawn, figure)
    assert result is not None
    variants = {"figure6": 3, "figure7": 3}.get(figure, 1)
    depth = 3 if figure == "figure5" else 4
    assert len(result.rows) == 4 * 2 * 2 * 3 * variants * depth  # models, seeds, schemes, policies
    assert {row["model"] for row in result.rows} == set(tiny.KINDS)
    assert {row["family"] for row in result.rows if row["model"].startswith("gpt")} == {"TBM"}
    assert {row["family"] for row in result.rows if row["model"].startswith("mamba")} == {"SSM"}


@pytest.mark.parametrize(
    ("figure", "norms", "scale"),
    [("figure3", "baseline", 1.0), ("figure6", "disabled", 1.0), ("figure7", "baseline", 0.5)],
)
def test_rows_are_the_stream_of_their_choice(figure: str, norms: str, scale: float, drawn: Path, models: Path):
    result = read_result(drawn, figure)
    assert result is not None
    chosen = {"model": "gpt_neo", "scheme": "gaussian", "policy": "scheme", "seed": 1}
    chosen |= {"norms": norms, "embedding_scale": scale}
    found = [row["value"] for row in result.rows if chosen.items() <= row.items()]
    expected = random_stream(
        str(models / "gpt_neo"),
        Initialisation(scheme="gaussian", policy="scheme", seed=1),
        norms=norms,  # pyright: ignore[reportArgumentType]
        embedding_scale=scale,
        tokens=64,
    )
    assert found == pytest.approx(expected.inter_token.tolist(), rel=1e-6)


def test_every_choice_is_stated(drawn: Path):
    about = json.loads((drawn / "figure6.json").read_text())
    assert about["request"]["seeds"] == [0, 1] and about["request"]["tokens"] == 64
    stated = about["models"]["mamba"]
    expected = {
        "protocol": "random_ids", "states": "residual", "tokens": 64, "sequences": 1, "dtypes": ["float32"],
        "weights": "random", "embeddings": "scheme", "positions": "scheme",
        "protected": "A_log, D, dt_bias, dt_proj.bias", "scan": "transformers",
        "float32_products": "highest", "device": "cpu", "blocks": ["ssm"],
    }  # fmt: skip
    assert expected.items() <= stated.items()
    assert stated["versions"].keys() == {"repflow", "torch", "transformers"}
    assert "norms" not in stated  # which is no choice, but what the figure is about
    assert "h^(0)" in about["choices"]["states"]


def test_a_stopped_run_goes_on(models: Path, tmp_path: Path):
    arguments = [
        *("figure3", "--init", "--model", models / "gpt_neo", "--length", "32", "--seeds", "1", "--scheme", "gaussian"),
        *("--no-pictures", "-o", tmp_path),
    ]
    reproduce(*arguments)
    whole = (tmp_path / "figure3.csv").read_bytes()
    (store,) = (tmp_path / "work" / "streams").iterdir()
    lines = store.read_text().splitlines()
    # As a kill leaves it: a line that ends within, and nothing of the figure.
    store.write_text("\n".join([lines[0], lines[1][: len(lines[1]) // 2]]))
    (tmp_path / "figure3.json").unlink()
    with pytest.warns(RuntimeWarning, match="line 2 is damaged; it is measured again"):
        result = reproduce(*arguments)
    told = [line.rpartition("gpt_neo, seed 0: ")[2] for line in result.splitlines() if "gpt_neo, seed 0: " in line]
    assert told[:2] == ["2 streams", "goes on at 33%"]
    rates = [re.fullmatch(r"(\d+)%, [\d.]+K? streams/s, (\d+:\d\d) left", line) for line in told[2:]]
    assert [rate and rate[1] for rate in rates] == ["67", "100"] and rates[1] and rates[1][2] == "0:00"
    assert (tmp_path / "figure3.csv").read_bytes() == whole
    again = reproduce(*arguments)
    assert "figure3: is there already" in again and "streams" not in again
    store.unlink()
    assert "3 streams" in reproduce(*arguments, "--force")
    assert "2 streams" in reproduce(*arguments[:-3], "--policy", "trivial", "--scheme", "xavier", "--scheme", "kaiming",
                                    *arguments[-3:])  # fmt: skip


def test_a_model_whose_window_is_too_small_is_said(models: Path, tmp_path: Path):
    result = reproduce(
        *("figure5", "--init", "--model", models / "gpt_neo", "--model", models / "mamba", "--length", "600"),
        *("--seeds", "1", "--scheme", "gaussian", "--policy", "scheme", "--no-pictures", "-o", tmp_path),
    )
    assert "skipped 600 tokens: the model's window is 512" in result
    about = json.loads((tmp_path / "figure5.json").read_text())
    assert about["skipped"] == ["gpt_neo: skipped 600 tokens: the model's window is smaller"]
    assert list(about["models"]) == ["mamba"]


def test_streams_of_several_versions_are_told(models: Path, tmp_path: Path):
    """Those of another version of torch, or another device, are gone on with; both are stated."""
    arguments = [
        *("figure6", "--init", "--model", models / "mamba2", "--length", "16", "--seeds", "1", "--scheme", "gaussian"),
        *("--no-pictures", "-o", tmp_path),
    ]
    reproduce(*arguments, "--policy", "trivial")
    (store,) = (tmp_path / "work" / "streams").iterdir()
    now = json.loads((tmp_path / "figure6.json").read_text())["models"]["mamba2"]
    store.write_text(store.read_text().replace(f'"torch": "{now["versions"]["torch"]}"', '"torch": "2.0.0"'))
    reproduce(*arguments, "--policy", "trivial", "--policy", "scheme")
    stated = json.loads((tmp_path / "figure6.json").read_text())["models"]["mamba2"]
    assert stated["versions"] == [now["versions"] | {"torch": "2.0.0"}, now["versions"]]
    assert stated["device_name"] == now["device_name"]
    assert not {"norms", "policy", "norms_changed"} & stated.keys()  # which rows tell


def test_what_the_checkpoint_ran_on_is_told(checkpoints: Path):
    about = json.loads((checkpoints / "figure5.json").read_text())
    assert about["choices"]["pretrained"].startswith("the checkpoint, on prompts of kvpr and mdqa of about 300 tokens")
    assert set(about["checkpoints"]) == {f"{model}/{task}/300" for model in ("gpt_neox", "mamba2")
                                         for task in ("kvpr", "mdqa")}  # fmt: skip


def test_a_model_without_claims_is_said(models: Path, tmp_path: Path):
    """Its blocks are neither attention nor state spaces, which is all that the paper has."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}
    transformers.AutoConfig.for_model("rwkv", **sizes).save_pretrained(tmp_path / "rwkv")
    named = ("--model", tmp_path / "rwkv", "--model", models / "gpt_neo")
    reproduce(
        *("figure3", "--init", *named, "--length", "16", "--seeds", "1", "--scheme", "gaussian", "--policy", "scheme"),
        *("--no-pictures", "-o", tmp_path),
    )
    result = read_result(tmp_path, "figure3")
    assert result is not None
    assert {row["family"] for row in result.rows if row["model"] == "rwkv"} == {"recurrent"}
    (told,) = result.about["unclaimed"]
    assert told.startswith("rwkv (recurrent): no claim is held against it")
    reproduce("report", tmp_path)
    assert html.escape(told) in (tmp_path / "report.html").read_text()
