"""`repflow inspect`: what it shows of models, and what it says where it cannot."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from repflow.monitor.cli import app
from repflow.monitor.inspection import inspect_model

FACTORIES = """
import torch
from torch import nn

def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2)

def reads_its_weights():
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4, bias=torch.zeros(1).item() == 0)))

def broken():
    raise RuntimeError("first\\nsecond")

def nothing():
    return 3

MODEL = encoder()
NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with factories and configurations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REPFLOW_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    Path("factories.py").write_text(FACTORIES)
    Path("config.json").write_text(
        json.dumps({"model_type": "zamba2", "num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]})
    )
    Path("list.json").write_text("[]")
    Path("broken.json").write_text("{")
    Path("empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("target", ["LlamaConfig", "llama", "LlamaForCausalLM"])
def test_a_name_in_transformers_takes_no_memory(target: str) -> None:
    """7 billion parameters, none of them anywhere."""
    found = inspect_model(target)
    assert type(found.model).__name__ == "LlamaForCausalLM"
    assert {parameter.device.type for parameter in found.model.parameters()} == {"meta"}
    assert (found.stream.name, len(found.stream)) == ("model.layers", 32)


@pytest.mark.parametrize("target", [".", "config.json"])
def test_a_configuration_on_disk(target: str, folder: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", target])
    assert result.exit_code == 0, result.output
    head, *lines = result.output.splitlines()
    assert head == "Zamba2ForCausalLM: stream 'model.layers', 2 blocks, 3 states"
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["0", "model.layers.0", "ssm", "ssm", "Zamba2MambaDecoderLayer"],
        ["1", "model.layers.1", "hybrid", "attention + ssm + mlp", "Zamba2HybridLayer"],
    ]
    assert "states      h0 is what 'model.layers.0' takes, h2 what 'model.layers.1' returns: first tensor" in lines
    assert "final norm  'model.final_layernorm', so that states=\"hf\" is possible" in lines
    assert "mask        as Zamba2Model receives it" in lines


def test_a_class_that_the_configuration_names(folder: Path) -> None:
    config = {"model_type": "t5", "architectures": ["T5EncoderModel"], "num_layers": 3}
    Path("config.json").write_text(json.dumps(config))
    found = inspect_model("config.json")
    assert (type(found.model).__name__, found.stream.name, len(found.stream)) == ("T5EncoderModel", "encoder.block", 3)


@pytest.mark.parametrize(
    ("target", "device"),
    [("factories:encoder", "meta"), ("factories:reads_its_weights", "cpu"), ("factories:MODEL", "cpu")],
)
def test_a_factory(target: str, device: str, folder: Path) -> None:
    found = inspect_model(target)
    assert {parameter.device.type for parameter in found.model.parameters()} == {device}


def test_what_cannot_be_read_is_said(folder: Path) -> None:
    encoder = CliRunner().invoke(app, ["inspect", "factories:encoder"]).output
    assert "returns: first tensor, [T, B, D]" in encoder
    assert 'final norm  none found beside the blocks: states="hf" is not possible' in encoder
    plain = CliRunner().invoke(app, ["inspect", "factories:reads_its_weights"]).output
    assert "mask        not seen: no module around the blocks takes one; give it, monitor.step(k, mask=...)" in plain
    assert "unknown     what block 0 is made of: nothing in it has a name that is known" in plain


def test_the_stream_of_text_in_a_model_with_others() -> None:
    found = inspect_model("Gemma3Config")
    assert found.stream.name == "model.language_model.layers"
    assert [text.partition(" ")[0] for text in found.others] == ["'model.vision_tower.encoder.layers'"]
    chosen = inspect_model("Gemma3Config", stream="vision_tower")
    assert (chosen.stream.name, len(chosen.stream)) == ("vision_tower", 12)


def test_options_choose_the_stream() -> None:
    result = CliRunner().invoke(app, ["inspect", "t5", "--stream", "decoder"])
    assert (
        "stream 'decoder', 6 blocks" in result.output and "not shown   'encoder.block' (6 × T5Block)" in result.output
    )
    result = CliRunner().invoke(app, ["inspect", "t5", "--blocks", "encoder.block"])
    assert "stream 'encoder.block', 6 blocks" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t5"], 'T5ForConditionalGeneration has two streams; pass stream="encoder" or stream="decoder"'),
        (
            ["bert", "--blocks", "bert.layers"],
            "no module 'bert.layers' in BertLMHeadModel; nearest: 'bert.encoder.layer",
        ),
        (["lama"], "lama: expected a class or model type of transformers (nearest: llama"),
        (["PreTrainedModel"], "PreTrainedModel: expected a class that can be built"),
        (["AutoModel"], "AutoModel: expected a class or model type of transformers"),
        (["owner/missing"], "owner/missing: OSError: "),
        (["empty"], "empty: expected a folder with a config.json, found none in it"),
        (["list.json"], "list.json: expected a configuration of transformers, found no model_type in it"),
        (["broken.json"], "broken.json: JSONDecodeError: "),
        (["factories:broken"], "factories:broken: RuntimeError: first second"),
        (["factories:nothing"], "factories:nothing: expected it to return a torch.nn.Module, got int"),
        (["factories:NUMBER"], "factories:NUMBER: expected a module, or something that returns one, got int"),
        (["factories:missing"], "factories:missing: AttributeError: module 'factories' has no attribute 'missing'"),
        (["nowhere.at_all:model"], "nowhere.at_all:model: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], message: str, folder: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("repflow: ") and message in line


def test_nothing_of_the_process_is_changed() -> None:
    import transformers

    before = transformers.logging.get_verbosity()
    inspect_model("GPT2Config")
    assert transformers.logging.get_verbosity() == before
    assert nn.Linear(2, 2).weight.device == torch.device("cpu")
