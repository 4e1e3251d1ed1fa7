"""What is to be measured on prompts, settled before anything is: so what cannot be done is said at once."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from repflow.monitor.offline import BeyondWindowError, OfflineError
from repflow.monitor.offline.loading import check_weights, hub_name, load_config, load_tokenizer, window_of
from repflow.monitor.offline.probe_split import stratified_group_split
from repflow.monitor.offline.probing import ProbeOptions
from repflow.monitor.offline.random_streams import random_ids
from repflow.monitor.offline.reproduce.depth import Depth, read_depth
from repflow.monitor.offline.reproduce.options import ReproduceOptions
from repflow.monitor.offline.reproduce.sources import commit_in
from repflow.monitor.offline.reproduce.work import content_key, place, slug
from repflow.monitor.offline.tasks import AbstractTask
from repflow.monitor.offline.tasks_command import make_task
from repflow.monitor.offline.tasks_length import (
    EncodedSamples,
    PromptEncoder,
    encode_samples,
    fit_items,
    shared_window,
)

Samples = tuple[EncodedSamples, dict[str, Any]]
"""Prompts as tokens, and how they were made."""
_PILOT = 512  # samples whose classes and contexts are looked at before many more are measured
_EACH_CLASS = 8  # at least so many of them


@dataclass(frozen=True, kw_only=True, eq=False)
class Planned:
    """A measurement that is to be there: of one model, task and length."""

    model: str
    """As it is called in data."""
    task: str
    length: int
    commit: str | None
    """Of a model on the hub."""
    folder: Path
    found: Depth | None
    """What is there already."""
    samples: Callable[[], Samples] | None
    """Makes the prompts; None where nothing is to be measured."""


def plan_depths(
    options: ReproduceOptions, lengths: tuple[int, ...], console: Console
) -> tuple[dict[str, list[Planned]], list[str]]:
    """The measurements of each model, and what was said of those that are beyond its window.

    Raises:
        OfflineError: there is no such model, tokenizer or data, a prompt of that length cannot be made, or there are
            too few samples for probes.
    """
    planner, skipped = _Planner(options), dict[str, None]()
    plans: dict[str, list[Planned]] = {}
    for name in options.model_names:
        plans[name] = []
        for length in lengths:
            for task in options.prompt_tasks:
                try:
                    plans[name].append(planner.planned(name, task, length))
                except BeyondWindowError as error:
                    skipped[f"{options.label(name)}: {error}"] = None
    for text in skipped:
        console.print(Text(text, style="yellow"), soft_wrap=True)
    return plans, list(skipped)


def depth_key(options: ReproduceOptions, name: str, task: str, length: int) -> dict[str, Any]:
    """What decides a measurement, but for the number of samples and whether features are kept: more will do."""
    return {
        "model": name,
        "revision": options.revision,
        "content": options.model_sources[name],
        "init": options.init,
        "dtype": options.dtype,
        "task": task,
        "length": length,
        "tokenizer": options.tokenizer,
        "tokenizer_content": options.tokenizer_source,
        "data": None if options.data is None else [str(options.data), content_key(str(options.data))],
        "seed": options.prompt_seed,
        "classes": options.classes,
        "crossed": options.probes == "released",
        "states": options.states,
        "cka": options.cka_estimator,
        "batch_tokens": options.batch_tokens,
    }


def _there(options: ReproduceOptions, name: str, task: str, length: int) -> tuple[Path, Depth | None]:
    """Where a measurement is that will do, and the measurement; or where it is to be made."""
    shared = place(options.folder, "prompts", f"{slug(name)}-{task}-{length}", depth_key(options, name, task, length))
    own = shared / f"{options.sample_count}{'-features' if options.features else ''}"
    if options.force:
        return own, None
    others: dict[Path, int] = {}
    for folder in shared.glob("*"):
        known = re.fullmatch(r"(\d+)(-features)?", folder.name)
        if known and options.enough(int(known[1])) and (known[2] or not options.features):
            others[folder] = int(known[1])
    for folder in sorted(others, key=lambda folder: (-others[folder], folder.name)):
        if (depth := read_depth(folder, options.label(name), task, length)) is not None:
            return folder, depth
    return own, None


class _Planner:
    """Plans measurements; loads configurations, tokenizers and questions once, and where they are needed."""

    def __init__(self, options: ReproduceOptions) -> None:
        self._options = options
        self._config = cache(self._checked_config)
        self._encoder = cache(self._new_encoder)
        self._task = cache(lambda task: make_task(task, seed=options.prompt_seed, data=options.data))

    def planned(self, name: str, task: str, length: int) -> Planned:
        """One measurement.

        Raises:
            BeyondWindowError: the length is beyond the model's window.
            OfflineError: see `plan_depths`.
        """
        window = window_of(self._config(name))
        limit = shared_window(length, window)
        folder, found = _there(self._options, name, task, length)
        samples = None
        if found is None and task == "random_ids":
            samples = partial(_random_samples, self._options, self._vocabulary(name), length)
        elif found is None:
            fitted = self._fitted(name, task, length, window)
            samples = partial(_task_samples, self._options, fitted, self._encoder(name), limit)
        return Planned(
            model=self._options.label(name),
            task=task,
            length=length,
            commit=commit_in(self._options.model_sources[name]),
            folder=folder,
            found=found,
            samples=samples,
        )

    def _fitted(self, name: str, task: str, length: int, window: int | None) -> AbstractTask:
        options = self._options
        fitted = fit_items(self._task(task), length, self._encoder(name), window)
        fitted = replace(fitted, classes=options.classes, crossed=options.probes == "released")
        if options.features:
            _check_probes(fitted, options)
        return fitted

    def _checked_config(self, name: str) -> Any:
        if self._options.init:
            return load_config(name)
        check_weights(name)
        return load_config(hub_name(name), self._options.revision)

    def _vocabulary(self, name: str) -> int:
        return int(self._config(name).get_text_config().vocab_size)

    def _new_encoder(self, name: str) -> PromptEncoder:
        options = self._options
        tokenizer = options.tokenizer or name
        revision = None if options.tokenizer else options.revision
        return PromptEncoder(load_tokenizer(tokenizer, revision), self._vocabulary(name))


def _check_probes(task: AbstractTask, options: ReproduceOptions) -> None:
    """Raise an OfflineError where probes could not be trained: the samples decide that, before they are measured."""
    chosen = ProbeOptions.of(options.probes)
    if not chosen.grouped:
        return
    count = min(options.sample_count, max(_PILOT, _EACH_CLASS * len(task.positions)))
    samples = [task.sample(index) for index in range(count)]
    labels, contexts = (np.array([getattr(one, name) for one in samples]) for name in ("label", "context"))
    for seed in options.probe_seeds:
        try:
            stratified_group_split(labels, contexts, validation=chosen.validation, seed=seed)
        except OfflineError as error:
            raise OfflineError(f"table1: {task.name} with {task.items} {task.unit}: {error}") from error


def _random_samples(options: ReproduceOptions, vocabulary: int, length: int) -> Samples:
    rows = random_ids(vocabulary, sequences=options.sample_count, tokens=length, seed=options.prompt_seed)
    nothing = np.zeros(len(rows), dtype=np.int64)
    samples = EncodedSamples(list(rows.to(torch.int32).numpy()), nothing, nothing, nothing, nothing)
    return samples, {"protocol": "random_ids", "task": "random_ids", "seed": options.prompt_seed}


def _task_samples(options: ReproduceOptions, task: AbstractTask, encoder: PromptEncoder, limit: int) -> Samples:
    samples = encode_samples(task, options.sample_count, encoder, limit)
    return samples, task.describe() | {"protocol": "task", "tokenizer": encoder.name}
