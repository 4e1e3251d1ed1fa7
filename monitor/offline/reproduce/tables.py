"""Tables 1 and 2: probing accuracy, and V_loc and V_glob over lengths."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from repflow.monitor.offline.probing import ProbeOptions, ProbeResult, train_probes
from repflow.monitor.offline.reproduce.depth import Depth, Depths, tasks_by_model
from repflow.monitor.offline.reproduce.depth_targets import about, key_of, like_the_papers
from repflow.monitor.offline.reproduce.options import ReproduceOptions
from repflow.monitor.offline.reproduce.paper import compare_table
from repflow.monitor.offline.reproduce.targets import Target
from repflow.monitor.offline.reproduce.work import known_json, plain, write_json
from repflow.monitor.offline.reproduce.written import Result, Row

_VARIATION = ("v_loc", "v_glob", "v_loc_rel", "v_glob_rel")


def table1(target: Target, options: ReproduceOptions, depths: Depths, console: Console) -> Result:
    """Probes of every state, on the measurements of every model, task and length."""
    chosen = ProbeOptions.of(options.probes, seeds=options.probe_seeds)
    rows: list[Row] = []
    arrays: dict[str, np.ndarray] = {}
    for model, length, group in tasks_by_model(depths.of(options.lengths_of(target))):
        part: list[dict[str, Any]] = []
        for depth in group:
            result = _probed(depth, chosen, options, console)
            arrays[key_of(depth)] = result.accuracy.numpy()
            part.append(_accuracies(depth, result))
        rows += [*part, *_mean_row(model, length, part)]
    told = about(target, options, depths)
    told["choices"] |= {
        "probes": asdict(chosen) | {"seeds": list(chosen.seeds)},
        "label": "number of the tested gold position",
        "accuracy": "%, mean over seeds, of the samples of validation",
        "drop": "accuracy at the peak, the state with the best mean, minus that of the last state",
    }
    told["comparison"] = _beside_the_paper(target, options, depths, rows, ("last", "drop"))
    return Result(target=target.name, rows=rows, arrays=arrays, about=told)


def table2(target: Target, options: ReproduceOptions, depths: Depths) -> Result:
    """V_loc and V_glob of every model, task and length, and relative to the RMS of the states."""
    rows: list[Row] = []
    for model, length, group in tasks_by_model(depths.of(options.lengths_of(target))):
        part = [_variation(depth) for depth in group]
        rows += [*part, *_mean_row(model, length, part)]
    told = about(target, options, depths)
    told["choices"] |= {
        "v_loc": "mean of |second difference| over the S − 2 interior states (the paper prints the normaliser L − 2)",
        "v_glob": "population standard deviation over all S states, mean over tokens and features",
        "relative": "v_loc_rel and v_glob_rel: divided by the RMS of the token's states",
    }
    told["comparison"] = _beside_the_paper(target, options, depths, rows, ("v_loc", "v_glob"))
    return Result(target=target.name, rows=rows, about=told)


def _beside_the_paper(
    target: Target, options: ReproduceOptions, depths: Depths, rows: Sequence[Row], columns: Sequence[str]
) -> list[dict[str, Any]]:
    alike = {(model, length) for model, length, _ in like_the_papers(depths.of(options.lengths_of(target)))}
    means = [row for row in rows if row["task"] == "mean" and (row["model"], row["length"]) in alike]
    return compare_table(target.name, means, columns)


def _probed(depth: Depth, chosen: ProbeOptions, options: ReproduceOptions, console: Console) -> ProbeResult:
    """Probes as they were trained before, or now."""
    text = json.dumps(asdict(chosen), sort_keys=True)
    path = depth.folder / f"probes-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.json"
    if (known := known_json(path)) is not None:
        accuracy = torch.tensor(known.pop("accuracy"), dtype=torch.float64)
        return ProbeResult(accuracy, known["classes"], known["choices"])
    console.print(Text(f"{depth.model}, {depth.task}, {depth.length:,} tokens: probes"), soft_wrap=True)
    extraction = depth.extraction
    states = extraction.snapshot.inter_token.numel()
    result = train_probes(
        extraction.features, states, extraction.labels, extraction.contexts, chosen, device=options.device
    )
    told = {"classes": result.classes, "choices": result.choices}
    write_json(path, {"accuracy": plain(result.accuracy)} | told)
    return result


def _accuracies(depth: Depth, result: ProbeResult) -> dict[str, Any]:
    spread = float(result.spread[-1])
    return {
        "model": depth.model,
        "task": depth.task,
        "length": depth.length,
        "samples": len(depth.extraction.labels),
        "contexts": len(np.unique(depth.extraction.contexts)),
        "classes": result.classes,
        "chance": 100 * result.chance,
        "last": 100 * float(result.mean[-1]),
        "last_spread": None if spread != spread else 100 * spread,
        "peak": 100 * float(result.mean[result.peak]),
        "peak_state": result.peak,
        "drop": 100 * result.drop,
    }


def _variation(depth: Depth) -> dict[str, Any]:
    snapshot = depth.extraction.snapshot
    values = dict(zip(_VARIATION, plain(torch.stack([getattr(snapshot, name) for name in _VARIATION])), strict=True))
    return {
        "model": depth.model,
        "task": depth.task,
        "length": depth.length,
        "tokens_mean": float(depth.extraction.tokens.mean()),
        **values,
    }


def _mean_row(model: str, length: int, part: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over tasks, of what has one; nothing for a single task."""
    if len(part) < 2:
        return []
    no_mean = ("model", "task", "length", "peak_state", "samples", "contexts", "classes", "last_spread")
    names = [name for name in part[0] if name not in no_mean]
    means = {
        name: fmean(row[name] for row in part) if all(row[name] is not None for row in part) else None for name in names
    }
    empty = dict.fromkeys(part[0])
    return [empty | {"model": model, "task": "mean", "length": length} | means]
