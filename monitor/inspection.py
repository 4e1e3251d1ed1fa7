"""`repflow inspect`: the residual stream of a model or of a configuration, as a table.

Nothing is run, and of a model on the hub only the configuration is fetched. Where it can be, the model is built without
memory for its weights.
"""

import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.nn import Module

from repflow._imports import require
from repflow.monitor.masks import MaskReader
from repflow.monitor.residual_stream import ResidualStream, find_residual_stream, list_names


class InspectError(ValueError):
    """What was asked for cannot be shown; the message is one line and says what to give instead."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """A model, and what was found in it."""

    model: Module
    stream: ResidualStream
    others: tuple[str, ...]
    """Lists of blocks that are not the stream."""


def inspect_model(target: str, *, stream: str | None = None, blocks: str | None = None) -> Inspection:
    """Find the stream of what `target` names.

    Args:
        target: a class of transformers (`LlamaConfig`, `LlamaForCausalLM`), a model type (`llama`), a folder or a JSON
            file with a configuration, the name of a model on the Hugging Face hub (`owner/name`), or
            `package.module:name`, where the name is a module, or something that returns one when called.
        stream: see `find_residual_stream`.
        blocks: dotted path; see `find_residual_stream`.

    Raises:
        InspectError: nothing can be made of `target`, or it has no stream to be found.
        ModuleNotFoundError: transformers is needed and missing.
    """
    model = load_model(target)
    try:
        found = find_residual_stream(model, blocks, stream=stream)
    except ValueError as error:
        raise InspectError(_line(error)) from error
    path = found.blocks[0].name.rpartition(".")[0]
    return Inspection(model, found, tuple(text for name, text in list_names(model).items() if name != path))


def load_model(target: str) -> Module:
    """The model that `target` names; see `inspect_model`."""
    name, colon, attribute = target.partition(":")
    if Path(target).exists():
        return _from_config(target, lambda: _read_config(Path(target)))
    if colon and attribute and all(part.isidentifier() for part in name.split(".")):
        return _from_python(target, name, attribute)
    return _from_name(target)


def _from_python(target: str, name: str, attribute: str) -> Module:
    """What `package.module:name` is, or returns; as with `python -m`, the working directory is searched too."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    made = _attempt(target, lambda: getattr(importlib.import_module(name), attribute))
    if not isinstance(made, Module):
        if not callable(made):
            raise InspectError(f"{target}: expected a module, or something that returns one, got {type(made).__name__}")
        made = _call(target, made)
    if not isinstance(made, Module):
        raise InspectError(f"{target}: expected it to return a torch.nn.Module, got {type(made).__name__}")
    return made


def _call(target: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, without memory for weights unless it reads values of its tensors."""
    try:
        with torch.device("meta"):
            return make()
    except Exception:
        return _attempt(target, make)


def _from_name(target: str) -> Module:
    """A class of transformers, a model type, or the name of a model on the hub."""
    require("transformers")
    import transformers

    found = getattr(transformers, target, None) if target.isidentifier() else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        config_class: Any = found.config_class
        if config_class is None:
            raise InspectError(f"{target}: expected a class that can be built, got one without a configuration")
        return _build(target, lambda: found(config_class()))
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedConfig):
        return _from_config(target, found)
    if target in transformers.CONFIG_MAPPING:
        return _from_config(target, lambda: transformers.CONFIG_MAPPING[target]())
    if target.count("/") == 1 and not target.startswith((".", "/", "~")) and not target.endswith("/"):
        return _from_config(target, lambda: transformers.AutoConfig.from_pretrained(target, trust_remote_code=False))
    known = [*transformers.CONFIG_MAPPING, *(name for name in dir(transformers) if name.endswith(("Config", "LM")))]
    near = ", ".join(difflib.get_close_matches(target, known, n=3)) or "none"
    raise InspectError(
        f"{target}: expected a class or model type of transformers (nearest: {near}), a folder or file with a "
        "configuration, owner/name on the hub, or package.module:factory"
    )


def _read_config(path: Path) -> Any:
    require("transformers")
    import transformers

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InspectError(f"{path}: expected a folder with a config.json, found none in it")
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or "model_type" not in values:
        raise InspectError(f"{file}: expected a configuration of transformers, found no model_type in it")
    return transformers.AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)


def _from_config(target: str, read: Callable[[], Any]) -> Module:
    """The model of a configuration: of the class that it names, or else the first of these that there is."""
    require("transformers")
    import transformers

    config = _attempt(target, read)
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    if made := next((found for found in named if found is not None), None):
        return _build(target, lambda: made(config))
    heads = [transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM, transformers.AutoModel]
    if config.is_encoder_decoder:
        heads.insert(0, transformers.AutoModelForSeq2SeqLM)
    head = next((auto for auto in heads if type(config) in auto._model_mapping), None)
    if head is None:
        raise InspectError(f"{target}: transformers has no model for a {type(config).__name__}")
    return _build(target, lambda: head.from_config(config))


def _build(target: str, make: Callable[[], Any]) -> Module:
    """A model of transformers without memory for its weights, and without what transformers has to say about it."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return _attempt(target, make)
    finally:
        transformers.logging.set_verbosity(verbosity)


def _attempt(target: str, call: Callable[[], Any]) -> Any:
    """What `call` returns; whatever it raises becomes one line."""
    try:
        return call()
    except InspectError:
        raise
    except Exception as error:
        raise InspectError(f"{target}: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def show(console: Console, inspection: Inspection) -> None:
    """Print the stream as a table, and beneath it how it is read."""
    model, stream = inspection.model, inspection.stream
    title = f"{type(model).__name__}: stream '{stream.name}', {len(stream)} blocks, {len(stream) + 1} states"
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table("block", "name", "kind", "parts", "class")
    for block in stream.blocks:
        table.add_row(
            str(block.index), block.name, block.kind, " + ".join(block.parts) or "–", type(block.module).__name__
        )
    console.print(table)
    for label, value in _remarks(inspection).items():
        # Not wrapped, whatever the width of the terminal, so that it can be copied.
        console.print(Text(f"{label:<12}", style="bold").append(value, style="none"), soft_wrap=True)


def _remarks(inspection: Inspection) -> dict[str, str]:
    """How the stream is read, and what cannot be."""
    model, stream = inspection.model, inspection.stream
    first, last = stream.blocks[0], stream.blocks[-1]
    readers = ", ".join(dict.fromkeys(block.reader.name for block in stream.blocks))
    norm = f"'{_name_of(model, stream.final_norm)}', so that states=\"hf\" is possible" if stream.final_norm else None
    taker = next((module for module in reversed(stream.ancestors) if MaskReader(module).takes_mask()), None)
    remarks = {
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "states": f"h0 is what '{first.name}' takes, h{len(stream)} what '{last.name}' returns: {readers}",
        "order": "held against the first forward that is monitored",
        "final norm": norm or 'none found beside the blocks: states="hf" is not possible',
        "mask": f"as {type(taker).__name__} receives it"
        if taker
        else "not seen: no module around the blocks takes one; give it, monitor.step(k, mask=...)",
    }
    if unknown := [str(block.index) for block in stream.blocks if block.kind == "other"]:
        remarks["unknown"] = f"what block {', '.join(unknown)} is made of: nothing in it has a name that is known"
    if inspection.others:
        remarks["not shown"] = ", ".join(inspection.others)
    return remarks


def _name_of(model: Module, wanted: Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
