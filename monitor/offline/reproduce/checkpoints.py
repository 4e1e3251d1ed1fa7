"""What is measured of a model on prompts: one extraction for every task and length, which all targets share."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.text import Text

from repflow.monitor.functional.adjacent import adjacent_layer_similarity
from repflow.monitor.offline import BeyondWindowError, OfflineError
from repflow.monitor.offline.batching import pad
from repflow.monitor.offline.extracted import Extraction
from repflow.monitor.offline.extraction import ExtractionOptions, extract
from repflow.monitor.offline.loading import LoadedModel, load_config, load_model, load_tokenizer, scan_of, window_of
from repflow.monitor.offline.memory import free_memory
from repflow.monitor.offline.processes import Processes
from repflow.monitor.offline.random_streams import random_ids
from repflow.monitor.offline.recorder import StateRecorder
from repflow.monitor.offline.reproduce.options import ReproduceOptions
from repflow.monitor.offline.reproduce.work import (
    content_key,
    device_name,
    place,
    read_json,
    slug,
    versions,
    write_json,
)
from repflow.monitor.offline.tasks_command import make_task
from repflow.monitor.offline.tasks_length import (
    EncodedSamples,
    PromptEncoder,
    encode_samples,
    fit_items,
    shared_window,
)
from repflow.monitor.residual_stream import find_residual_stream
from repflow.monitor.warning import warn

_DONE, _MAP = "measured.json", "token_map.npy"


@dataclass(frozen=True, kw_only=True, eq=False)
class Depth:
    """What was measured of one model, task and length."""

    model: str
    task: str
    length: int
    """Tokens that were asked for."""
    folder: Path
    extraction: Extraction
    token_map: Float[np.ndarray, "blocks T"]
    """Adjacent cosine of every token of the first prompt."""
    choices: dict[str, Any]
    """Every choice, as plain values."""


@dataclass(eq=False)
class Depths:
    """All that was measured, and what could not be."""

    found: list[Depth] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """What was said of lengths beyond a model's window."""

    def of(self, lengths: tuple[int, ...]) -> list[Depth]:
        """Those of some lengths."""
        return [depth for depth in self.found if depth.length in lengths]


def measure_depths(
    options: ReproduceOptions, lengths: tuple[int, ...], processes: Processes, console: Console
) -> Depths:
    """Measure every model on every task and length, but for what is there. Processes share the prompts.

    Raises:
        OfflineError: there is no such model, tokenizer or data, it cannot be followed, or memory does not suffice.
    """
    depths = Depths()
    for name in options.model_names:
        window = window_of(load_config(name))
        lender = _Lender(options, name)
        for length in lengths:
            try:
                shared_window(length, window)
            except BeyondWindowError as error:
                depths.skipped.append(f"{name}: {error}")
                console.print(Text(depths.skipped[-1], style="yellow"), soft_wrap=True)
                continue
            for task in options.prompt_tasks:
                try:
                    depths.found.append(_measured(options, name, task, length, lender, processes, console))
                except BeyondWindowError as error:  # of this task alone
                    depths.skipped.append(f"{name}: {error}")
                    console.print(Text(depths.skipped[-1], style="yellow"), soft_wrap=True)
        del lender
        free_memory()
    return depths


class _Lender:
    """A model that is loaded when it is first asked for."""

    def __init__(self, options: ReproduceOptions, name: str) -> None:
        self._load: Callable[[], LoadedModel] = lambda: load_model(
            name,
            init=options.init,
            dtype=options.weights_dtype,
            device=options.device,
            device_map=options.device_map,
        )
        self._tokenizer = options.tokenizer or name
        self._loaded: LoadedModel | None = None
        self._encoder: PromptEncoder | None = None

    @property
    def model(self) -> LoadedModel:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def encoder(self) -> PromptEncoder:
        if self._encoder is None:
            self._encoder = PromptEncoder(load_tokenizer(self._tokenizer), self.model.vocabulary)
        return self._encoder


def depth_key(options: ReproduceOptions, name: str, task: str, length: int) -> dict[str, Any]:
    """What decides a measurement."""
    return {
        "model": name,
        "content": content_key(name),
        "init": options.init,
        "dtype": options.dtype,
        "task": task,
        "length": length,
        "tokenizer": options.tokenizer,
        "data": None if options.data is None else [str(options.data), content_key(str(options.data))],
        "samples": options.sample_count,
        "classes": options.classes,
        "crossed": options.probes == "released",
        "states": options.states,
        "cka": options.cka_estimator,
        "features": options.features,
        "batch_tokens": options.batch_tokens,
    }


def _measured(
    options: ReproduceOptions,
    name: str,
    task: str,
    length: int,
    lender: _Lender,
    processes: Processes,
    console: Console,
) -> Depth:
    key = depth_key(options, name, task, length)
    folder = place(options.folder, "prompts", f"{slug(name)}-{task}-{length}", key)
    if options.force and not processes.rank:
        shutil.rmtree(folder, ignore_errors=True)
    processes.wait()
    label = options.label(name)
    if (depth := _read(folder, label, task, length)) is not None:
        return depth
    samples, described = _samples(options, task, length, lender)
    loaded = lender.model
    console.print(Text(f"{label}, {task}, {length:,} tokens: {len(samples):,} prompts"), soft_wrap=True)
    extraction = extract(
        loaded,
        samples,
        folder / "extraction",
        ExtractionOptions(
            states=options.states,
            cka_estimator=options.cka_estimator,
            features=options.features,
            batch_tokens=options.batch_tokens,
        ),
        about=described,
        console=console,
    )
    if not processes.rank:
        np.save(folder / _MAP, _token_map(loaded, samples, options), allow_pickle=False)
        told = {
            "blocks": sorted({block.kind for block in find_residual_stream(loaded.model).blocks}),
            "scan": scan_of(lender.model.model),
            "device_name": device_name(loaded.device.type),
            "versions": versions(),
        }
        lengths = [int(extraction.tokens.min()), float(extraction.tokens.mean()), int(extraction.tokens.max())]
        write_json(folder / _DONE, extraction.choices | told | {"tokens_min_mean_max": lengths})
    processes.wait()
    depth = _read(folder, label, task, length)
    assert depth is not None
    return depth


def _read(folder: Path, name: str, task: str, length: int) -> Depth | None:
    """A measurement that is whole; None if it is to be made, or gone on with."""
    choices = read_json(folder / _DONE)
    if choices is None:
        return None
    try:
        extraction = Extraction.open(folder / "extraction")
    except OfflineError:
        return None  # what is damaged is told where it is read; the rest is gone on with
    try:
        token_map = np.load(folder / _MAP, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        warn(f"{folder / _MAP} is damaged ({type(error).__name__}); it is made again")
        return None
    return Depth(
        model=name,
        task=task,
        length=length,
        folder=folder,
        extraction=extraction,
        token_map=token_map,
        choices=choices,
    )


def _samples(
    options: ReproduceOptions, task: str, length: int, lender: _Lender
) -> tuple[EncodedSamples, dict[str, Any]]:
    """The prompts as tokens, and how they were made."""
    if task == "random_ids":
        rows = random_ids(lender.model.vocabulary, sequences=options.sample_count, tokens=length)
        nothing = np.zeros(len(rows), dtype=np.int64)
        samples = EncodedSamples(list(rows.to(torch.int32).numpy()), nothing, nothing, nothing, nothing)
        return samples, {"protocol": "random_ids", "task": task, "seed": 0}
    make, window = make_task(task, classes=options.classes, data=options.data), lender.model.window
    fitted = fit_items(make, length, lender.encoder, window)
    fitted = replace(fitted, crossed=options.probes == "released")
    samples = encode_samples(fitted, options.sample_count, lender.encoder, shared_window(length, window))
    return samples, fitted.describe() | {"protocol": "task", "tokenizer": lender.encoder.name}


def _token_map(loaded: LoadedModel, samples: EncodedSamples, options: ReproduceOptions) -> np.ndarray:
    """`[S-1, T]`: the adjacent cosine of every token of the first prompt."""
    found: list[np.ndarray] = []

    def keep(states: torch.Tensor) -> None:
        found.append(adjacent_layer_similarity(states)[:, 0].float().cpu().numpy())

    ids, _ = pad(samples.ids[:1])
    with StateRecorder(loaded.model, metrics=(), states=options.states, on_states=keep) as recorder:
        recorder.measure(ids.to(loaded.device))
    return found[0]


def tasks_by_model(depths: list[Depth]) -> Iterator[tuple[str, int, list[Depth]]]:
    """Model, length, and the measurements on each task."""
    for model, length in dict.fromkeys((depth.model, depth.length) for depth in depths):
        yield model, length, [depth for depth in depths if (depth.model, depth.length) == (model, length)]
