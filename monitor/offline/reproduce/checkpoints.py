"""Measures models on prompts: one extraction for every task and length, which all targets share."""

import shutil
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from repflow.monitor.functional.adjacent import adjacent_layer_similarity
from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.batching import pad
from repflow.monitor.offline.extraction import ExtractionOptions, extract
from repflow.monitor.offline.loading import LoadedModel, load_model, scan_of
from repflow.monitor.offline.memory import free_memory, out_of_memory_told
from repflow.monitor.offline.processes import Processes
from repflow.monitor.offline.recorder import StateRecorder
from repflow.monitor.offline.reproduce.depth import DONE, EXTRACTION, TOKEN_MAP, Depth, Depths, read_depth
from repflow.monitor.offline.reproduce.options import ReproduceOptions
from repflow.monitor.offline.reproduce.planning import Planned, plan_depths
from repflow.monitor.offline.reproduce.work import device_name, versions, write_json
from repflow.monitor.offline.tasks_length import EncodedSamples
from repflow.monitor.residual_stream import find_residual_stream


def measure_depths(
    options: ReproduceOptions, lengths: tuple[int, ...], processes: Processes, console: Console
) -> Depths:
    """Measure every model on every task and length, but for what is there. Processes share the prompts.

    What goes wrong with one measurement is kept and said; the others are made.

    Raises:
        OfflineError: what is asked for cannot be done, which is told before anything is measured; or something went
            wrong in one of several processes, of which the others cannot know.
    """
    plans, skipped = plan_depths(options, lengths, console)
    depths = Depths(skipped=skipped)
    for name, wanted in plans.items():
        lend = cache(lambda name=name: _load(options, name))  # when it is first asked for
        for plan in wanted:
            wrong = ""
            try:
                with out_of_memory_told():
                    depths.found.append(_measured(options, plan, lend, processes, console))
            except OfflineError as error:
                if processes.world > 1:
                    raise
                wrong = f"{plan.model}, {plan.task}, {plan.length:,} tokens: {error}"
            if wrong:  # out of the exception, whose traceback holds what was allocated
                free_memory()
                depths.failed.setdefault(plan.length, []).append(wrong)
                console.print(Text(wrong, style="yellow"), soft_wrap=True)
        del lend
        free_memory()
    return depths


def _load(options: ReproduceOptions, name: str) -> LoadedModel:
    return load_model(
        name,
        init=options.init,
        dtype=options.weights_dtype,
        device=options.device,
        device_map=options.device_map,
        revision=options.revision,
    )


def _measured(
    options: ReproduceOptions,
    plan: Planned,
    lend: Callable[[], LoadedModel],
    processes: Processes,
    console: Console,
) -> Depth:
    if plan.found is not None:
        return plan.found
    assert plan.samples is not None
    if options.force and not processes.rank:
        shutil.rmtree(plan.folder, ignore_errors=True)
    processes.wait()
    samples, described = plan.samples()
    loaded = lend()
    console.print(Text(f"{plan.model}, {plan.task}, {plan.length:,} tokens: {len(samples):,} prompts"), soft_wrap=True)
    extraction = extract(
        loaded,
        samples,
        plan.folder / EXTRACTION,
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
        np.save(plan.folder / TOKEN_MAP, _token_map(loaded, samples, options), allow_pickle=False)
        told = {
            "revision": plan.commit,
            "blocks": sorted({block.kind for block in find_residual_stream(loaded.model).blocks}),
            "scan": scan_of(loaded.model),
            "device_name": device_name(loaded.device.type),
            "versions": versions(),
        }
        lengths = [int(extraction.tokens.min()), float(extraction.tokens.mean()), int(extraction.tokens.max())]
        write_json(plan.folder / DONE, extraction.choices | told | {"tokens_min_mean_max": lengths})
    processes.wait()
    depth = read_depth(plan.folder, plan.model, plan.task, plan.length)
    assert depth is not None
    return depth


def _token_map(loaded: LoadedModel, samples: EncodedSamples, options: ReproduceOptions) -> np.ndarray:
    """`[S-1, T]`: the adjacent cosine of every token of the first prompt."""
    found: list[np.ndarray] = []

    def keep(states: torch.Tensor) -> None:
        found.append(adjacent_layer_similarity(states)[:, 0].float().cpu().numpy())

    ids, _ = pad(samples.ids[:1])
    with StateRecorder(loaded.model, metrics=(), states=options.states, on_states=keep) as recorder:
        recorder.measure(ids.to(loaded.device))
    return found[0]
