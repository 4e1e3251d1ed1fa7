"""What the models read: the source text of installed Python packages, and the tokenizer that is made for it."""

import json
import os
import random
import re
import sysconfig
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END = "<|endoftext|>"
"""Stands between files, and after a sample of KVPR."""
VALIDATION_SHARE = 0.02
TEXT_MIB = {False: 64.0, True: 1.0}
"""Most text to read, by `--tiny`. Unit: MiB."""
_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_PIECES = r"[0-9a-f]{2}(?=[0-9a-f-]*\z)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Of what is cut at UUIDs: two hexadecimal digits that only digits and dashes follow, which is the inside of a UUID;
elsewhere words, single digits, signs and white space."""
_LEARNED_BYTES = 8 * 2**20  # of text, from which merges are learned
_ENCODED_AT_ONCE = 256  # files, of what would take a hundred bytes per token
_LEAST_HELD = 2**14  # bytes that are held out, more than a row of tokens however well they fit
_LEARNED_UUIDS = 20_000  # enough for every pair of digits to be merged


@dataclass(frozen=True)
class Corpus:
    """Text as tokens, the last files of it held out."""

    train: Tensor
    """`Int32[N]`."""
    validation: Tensor
    """`Int32[M]`."""
    validation_bytes: int
    tokenizer: PreTrainedTokenizerFast


def prepare(folder: Path, text_mib: float, text: Path | None = None) -> None:
    """Make tokenizer and tokens in `folder`, once: what is there already is left as it is.

    Args:
        folder: for `tokenizer/`, `tokens.npz` and `corpus.json`.
        text_mib: most text to read. Unit: MiB.
        text: a folder whose `*.py`, `*.md` and `*.txt` are read; the packages of this Python if None.

    Raises:
        SystemExit: there is too little text, or what is there is of other text than is asked for.
    """
    if (folder / "corpus.json").exists():
        _check(folder, {"text_mib": text_mib} | ({"text": text.name} if text else {}))
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = list(_read([text] if text else _packages(), int(text_mib * 2**20)))
    held = max(1, round(VALIDATION_SHARE * len(files)))
    if len(files) < 2:
        raise SystemExit(f"--text: expected a folder with two text files or more, found {len(files)} in {text}")
    while held < len(files) // 2 and sum(len(file.encode()) for file in files[-held:]) < _LEAST_HELD:
        held += 1
    tokenizer = train_tokenizer(files[:-held])
    tokenizer.save_pretrained(folder / "tokenizer")
    tokens = [_encode(tokenizer, part) for part in (files[:-held], files[-held:])]
    np.savez(folder / "tokens.npz", train=tokens[0], validation=tokens[1])
    sizes = {"files": len(files), "validation_bytes": sum(len(file.encode()) for file in files[-held:])}
    counts = {"train_tokens": len(tokens[0]), "validation_tokens": len(tokens[1]), "vocabulary": len(tokenizer)}
    asked = {"text_mib": text_mib, "text": text.name if text else None}
    partial = folder / "corpus.partial"  # the last file, and whole when it is there
    partial.write_text(json.dumps(asked | sizes | counts, indent=2) + "\n")
    os.replace(partial, folder / "corpus.json")


def _check(folder: Path, asked: dict[str, Any]) -> None:
    """Raise a SystemExit where the tokens are of other text."""
    about = json.loads((folder / "corpus.json").read_text())
    for name, value in asked.items():
        if name in about and about[name] != value:
            raise SystemExit(
                f"{folder}: expected the tokens of --{name.replace('_', '-')} {value}, found those of {about[name]}; "
                "name the same, another folder, or remove this one"
            )


def load(folder: Path) -> Corpus:
    """What `prepare` left in `folder`."""
    about = json.loads((folder / "corpus.json").read_text())
    with np.load(folder / "tokens.npz") as tokens:
        train, validation = (torch.from_numpy(tokens[name].astype(np.int32)) for name in ("train", "validation"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return Corpus(train, validation, about["validation_bytes"], cast(PreTrainedTokenizerFast, tokenizer))


def train_tokenizer(files: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which a UUID is 16 tokens of two digits each, and 4 dashes.

    So a pair of UUIDs takes about as many tokens as with the tokenizer of GPT-NeoX, and every UUID equally many.
    """
    tokenizer = Tokenizer(models.BPE())
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_UUID, _PIECES)]
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, bytewise])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(0)
    uuids = (str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(_LEARNED_UUIDS))
    tokenizer.train_from_iterator([*_head(files, _LEARNED_BYTES), *uuids], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _encode(tokenizer: PreTrainedTokenizerFast, files: list[str]) -> Any:
    end = tokenizer.convert_tokens_to_ids(END)
    assert tokenizer.backend_tokenizer is not None
    rows: list[Any] = []
    for start in range(0, len(files), _ENCODED_AT_ONCE):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(files[start : start + _ENCODED_AT_ONCE])
        rows += [np.array([*row.ids, end], dtype=np.uint16) for row in encoded]
    return np.concatenate(rows)


def _head(files: list[str], size: int) -> Iterator[str]:
    for file in files:
        if size <= 0:
            return
        yield file
        size -= len(file)


def _packages() -> list[Path]:
    """Where the packages of this Python are: the standard library, and what stands beside PyTorch."""
    return [Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parents[1]]


def _read(folders: list[Path], size: int) -> Iterator[str]:
    """Text files in an order that mixes folders, up to so many bytes."""
    found = {path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md", ".txt")}
    files = sorted(path for path in found if not re.search(r"/(tests?|__pycache__)/", str(path)) and path.is_file())
    random.Random(0).shuffle(files)
    for file in files:
        if size <= 0:
            return
        content = file.read_text(encoding="utf-8", errors="replace")[: 2**17]  # no table is to be most of the text
        if content.strip():
            yield content
            size -= len(content.encode())
