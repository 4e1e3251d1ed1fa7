"""Loading: real checkpoints of small models, configurations alone, and everything that is none."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.loading import load_config, load_model, load_tokenizer, window_of
from repflow.monitor.offline.paper_models import PAPER_MODELS
from repflow.monitor.residual_stream import find_residual_stream
from tests.monitor.offline import tiny


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_checkpoint(kind: str, tmp_path: Path):
    """What was saved with a head is loaded without it, bit for bit, in evaluation mode."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path, kind))
    loaded = load_model(str(tmp_path))
    assert not loaded.model.training
    body = dict(whole.base_model.named_parameters())
    found = dict(loaded.model.named_parameters())
    assert found.keys() == body.keys()
    assert all(torch.equal(found[name], body[name]) for name in body)
    assert loaded.window == (None if "mamba" in kind else tiny.WINDOW)
    assert loaded.vocabulary == tiny.VOCABULARY
    assert loaded.describe()["weights"] == "pretrained"


@pytest.mark.parametrize("name", ["gpt2", "owner/model"])
def test_a_name_that_the_cache_of_the_hub_knows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With an owner or without, as the oldest models are."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    folder, commit = tmp_path / f"models--{name.replace('/', '--')}", "c0ffee" * 6 + "c0de"
    tiny.save(folder / "snapshots" / commit, "gpt_neox")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    loaded = load_model(name)
    assert loaded.fingerprint() == load_model(str(folder / "snapshots" / commit)).fingerprint()
    assert (loaded.name, loaded.describe()["revision"]) == (name, commit)
    assert load_model(name, init=True).describe()["revision"] == commit
    assert load_model(name, revision=commit).describe()["revision"] == commit
    assert load_config(name).model_type == "gpt_neox"
    assert load_tokenizer(name)("Key: value")["input_ids"] == tiny.tokenizer()("Key: value")["input_ids"]


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path):
    prints = [load_model(str(tiny.save(tmp_path / name, "mamba", seed=seed))).fingerprint() for name, seed in
              (("a", 0), ("b", 0), ("c", 1))]  # fmt: skip
    assert prints[0] == prints[1] != prints[2]
    loaded = load_model(str(tmp_path / "a"))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter *= 1.0001
    assert loaded.fingerprint() != prints[0]


def test_another_dtype(tmp_path: Path):
    tiny.save(tmp_path, "gpt_neox", dtype=torch.bfloat16)
    assert load_model(str(tmp_path)).describe()["dtypes"] == ["bfloat16"]
    assert load_model(str(tmp_path), dtype=torch.float32).describe()["dtypes"] == ["float32"]


def test_a_configuration_alone(tmp_path: Path):
    tiny.config("gpt_neo").save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    one, same, other = (load_model(str(tmp_path), init=True, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert (one.describe()["weights"], one.describe()["dtypes"]) == ("random", ["float32"])
    assert load_model(str(tmp_path / "config.json"), init=True, seed=3).fingerprint() == one.fingerprint()


PARAMETERS = {
    "gpt-neo-2.7b": (32, 2_651_307_520),
    "pythia-2.8b": (32, 2_646_430_720),
    "mamba-2.8b": (64, 2_768_345_600),
    "mamba2-2.7b": (64, 2_702_599_680),
    "mamba2-130m": (24, 128_989_632),
}


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_models_of_the_paper(name: str):
    """Their sizes, without memory for them; the head, which shares the embedding but in Pythia, is not counted."""
    config = load_config(name.upper())
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    blocks, parameters = PARAMETERS[name]
    assert len(find_residual_stream(model)) == blocks
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert window_of(config) == (2048 if "mamba" not in name else None)


def test_device_map_on_the_disk(tmp_path: Path):
    """What does not fit is kept elsewhere until it is needed: here two blocks of three on the disk."""
    tiny.save(tmp_path, "gpt_neox")
    bare = load_model(str(tmp_path))
    places = {"embed_in": "cpu", "rotary_emb": "cpu", "final_layer_norm": "cpu", "layers.0": "cpu"}
    spread = load_model(str(tmp_path), device_map=places | {"layers.1": "disk", "layers.2": "disk"})
    assert {p.device.type for p in spread.model.parameters()} == {"cpu", "meta"}
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected, found = (one.model(ids.to(one.device)).last_hidden_state for one in (bare, spread))
    assert torch.equal(expected, found)


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    match how:
        case "no weights":
            file.unlink()
        case "cut":
            file.write_bytes(file.read_bytes()[:1000])
        case "incomplete":
            weights = load_file(file)
            save_file({name: weights[name] for name in weights if "layers.2." not in name}, file, {"format": "pt"})
        case "other sizes":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
        case "no config":
            (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", r"expected a checkpoint, found no weights .*--init draws them"),
        ("cut", "could not be loaded: "),
        (
            "incomplete",
            r"whole checkpoint of GPTNeoXModel, found none of 12 parameters, such as layers\.2\..*random",
        ),
        ("other sizes", "could not be loaded: .*size"),
        ("no config", r"expected a folder with a model, found no config\.json in it"),
    ],
)
def test_a_damaged_checkpoint(how: str, message: str, tmp_path: Path):
    damage(tiny.save(tmp_path, "gpt_neox"), how)
    with pytest.raises(OfflineError, match=message) as caught:
        load_model(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "absent",
            {},
            "expected a folder with a model, owner/name on the Hugging Face hub .* or one of gpt-neo-2.7b, .*; it",
        ),
        ("./absent/model", {}, "found nothing there"),
        ("owner/absent", {}, "owner/absent: could not be loaded: .*"),
        ("list.json", {"init": True}, "list.json: expected a folder with a model, or a JSON file with a configuration"),
        ("odd.json", {"init": True}, "odd.json: could not be loaded: .*"),
        ("gpt-neo-2.7b", {"init": True, "device_map": "auto"}, "--device-map: expected a checkpoint to spread"),
    ],
)
def test_what_is_no_model(
    name: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("odd.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(OfflineError, match=message) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)


def test_device_map_in_several_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OfflineError, match="--device-map: expected one process, which takes all devices; start it"):
        load_model("pythia-2.8b", device_map="auto")


def test_a_tokenizer(tmp_path: Path):
    tiny.save(tmp_path, "mamba")
    assert load_tokenizer(str(tmp_path))("Key: value")["input_ids"] == tiny.tokenizer()("Key: value")["input_ids"]
