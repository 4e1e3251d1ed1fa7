"""The examples run from top to bottom, and so does the code of docs/loops.md."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
import transformers
from accelerate import Accelerator
from lightning.fabric import Fabric
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader

from repflow.monitor import open_run

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
LOOPS = re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", (ROOT / "docs" / "loops.md").read_text(), re.DOTALL | re.M)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)  # where Python looks first if it is given a script there


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs one of them as a script, and returns the run whose file it has printed."""

    def run(name: str, *arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        (path,) = re.findall(r"^run file: (.+)$", capsys.readouterr().out, re.M)
        return open_run(path)

    return run


def check(run: Any, steps: list[int], tokens: int | None = 8 * 64) -> None:
    """A model has learnt something, and it was watched."""
    assert run.step.values.tolist() == steps
    assert run.loss.values[0] > run.loss.values[-1] > 0
    assert run.inter_token.notnull().all() and run.cka.notnull().all()
    assert tokens is None or set(run.tokens.values.tolist()) == {tokens}


@pytest.mark.parametrize("name", ["plain_pytorch", "fabric"])
def test_every_batch_a_step(example, name) -> None:
    run = example(name)
    check(run, [0, 5, 10, 15, 20, 25, 30])
    assert run.attrs["stream"] == "gpt_neox.layers"


@pytest.mark.parametrize("name", ["accelerate_loop", "hf_trainer", "lightning_callback"])
def test_every_second_batch_a_step(example, name) -> None:
    check(example(name), [0, 5, 10, 15], tokens=2 * 8 * 64)


def test_fine_tuning_of_a_folder(example, tmp_path) -> None:
    """A checkpoint and tokenizer of another kind: Llama, and whole words."""
    words = ["<unk>", "def", "return", "self", "(", ")", ":", ".", "#", "="]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "pretrained"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    run = example("finetune", str(folder))
    check(run, [0, 5, 10, 15, 20, 25], tokens=None)
    assert run.attrs["stream"].endswith("model.layers") and run.sizes["state"] == 4
    assert len(set(run.tokens.values.tolist())) > 1  # padding is not measured
    assert (tmp_path / "finetuned" / "adapter_model.safetensors").exists()


def test_fine_tuning_in_full_without_a_folder(example, tmp_path) -> None:
    check(example("finetune", "--full"), [0, 5, 10, 15, 20, 25], tokens=None)
    assert (tmp_path / "tiny-checkpoint" / "tokenizer.json").exists()
    assert (tmp_path / "finetuned" / "model.safetensors").exists()


def test_all_examples_are_tested_and_listed() -> None:
    tested = {"plain_pytorch", "fabric", "accelerate_loop", "hf_trainer", "lightning_callback", "finetune"}
    listed = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text())
    assert set(SCRIPTS) == set(listed) == tested


def surroundings(loop: str) -> dict[str, Any]:
    """What the code of a loop takes for granted: five batches of a small model."""
    model = runpy.run_path(str(EXAMPLES / "_small.py"))["small_model"]()
    ids = torch.randint(0, 256, (20, 12))
    dataset = [{"input_ids": row, "labels": row} for row in ids]
    names: dict[str, Any] = {"model": model, "dataset": dataset, "loader": DataLoader(dataset, 4)}  # type: ignore[arg-type]
    names["optimizer"] = torch.optim.AdamW(model.parameters(), 1e-3)
    if loop == "Lightning":
        quiet: dict[str, Any] = dict(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
        names["Trainer"] = lambda **options: lightning.pytorch.Trainer(**options, **quiet)
        names["module"] = Module(model)
    elif loop == "Hugging Face Trainer":
        names["Trainer"] = transformers.Trainer
        options: dict[str, Any] = dict(
            use_cpu=True, per_device_train_batch_size=4, num_train_epochs=1, disable_tqdm=True
        )
        names["args"] = transformers.TrainingArguments("trained", save_strategy="no", **options)
    elif loop == "Lightning Fabric":
        names["fabric"] = Fabric(accelerator="cpu", devices=1)
    elif loop == "Accelerate":
        names["accelerator"] = Accelerator(cpu=True)
    return names


class Module(lightning.pytorch.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|isinstance.treespec)")
@pytest.mark.parametrize(("loop", "code"), LOOPS, ids=[loop for loop, _ in LOOPS])
def test_the_loops_of_the_documentation(loop, code, tmp_path) -> None:
    exec(code, surroundings(loop))
    (path,) = tmp_path.glob("repflow-runs/*.db")
    with open_run(path) as run:
        assert run.step.values.tolist() == [0] and run.tokens.values.tolist() == [48] and run.loss.values[0] > 0


def test_every_loop_has_its_code() -> None:
    loops = ["A loop of your own", "Lightning", "Hugging Face Trainer", "Lightning Fabric", "Accelerate"]
    assert [loop for loop, _ in LOOPS] == loops
