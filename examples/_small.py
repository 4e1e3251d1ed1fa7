"""What the examples share: a small language model over bytes, text to train it on, and a look at what came out."""

import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from repflow.monitor import open_run

TOKENS = 64
"""Bytes per sequence."""
ROWS = 8
"""Sequences per batch."""


def small_model() -> GPTNeoXForCausalLM:
    """A transformer of six blocks with random weights, which reads bytes."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 256,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes))


def save_small_checkpoint(folder: Path) -> Path:
    """Save the model, and a tokenizer whose tokens are the 256 bytes, as pretrained ones are."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    small_model().save_pretrained(folder)
    return folder


def text() -> Iterator[str]:
    """The source of Python's standard library, file by file."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield file.read_text(encoding="utf-8", errors="replace")


def sequences(number: int) -> Tensor:
    """`[number, TOKENS]` bytes of it."""
    data = bytearray("".join(itertools.islice(text(), 12)), "utf-8")[: number * TOKENS]
    return torch.frombuffer(data, dtype=torch.uint8).view(number, TOKENS).long()


def loader(batches: int) -> DataLoader[Tensor]:
    """Batches of it, `[ROWS, TOKENS]` each, in order."""
    return DataLoader(cast("Dataset[Tensor]", sequences(batches * ROWS)), batch_size=ROWS)


def show(run_file: Path | None) -> None:
    """Print how tokens of a sequence come to resemble each other over depth, and where to see more."""
    assert run_file is not None, "nothing was measured"
    with open_run(run_file) as run:
        for step in (run.step.values[0], run.step.values[-1]):
            here = run.sel(step=step)
            similarity = " ".join(f"{value:5.2f}" for value in here.inter_token.values)
            print(f"step {step:3}: loss {float(here.loss):5.2f}, inter-token similarity of each state {similarity}")
    print(f"run file: {run_file}")
    print(f"report:   repflow report {run_file} -o report.html")
