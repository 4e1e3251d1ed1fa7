"""Figures 1, 2 and 4: rows and arrays out of what was measured on prompts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repflow.monitor.offline.reproduce.claims import Curve
from repflow.monitor.offline.reproduce.depth import Depth, Depths, sample_counts, tasks_by_model
from repflow.monitor.offline.reproduce.options import ReproduceOptions
from repflow.monitor.offline.reproduce.paper import PAPER_LENGTH, compare_curves, compare_matrices, reading_of
from repflow.monitor.offline.reproduce.planning import depth_key
from repflow.monitor.offline.reproduce.targets import Target
from repflow.monitor.offline.reproduce.work import plain
from repflow.monitor.offline.reproduce.written import Result, Row
from repflow.monitor.offline.tasks_command import TASKS


def depth_request(target: Target, options: ReproduceOptions) -> dict[str, Any]:
    """What decides the rows of a target, but for the number of samples."""
    request = {
        "measured": [
            depth_key(options, name, task, length)
            for name in options.model_names
            for task in options.prompt_tasks
            for length in options.lengths_of(target)
        ]
    }
    return request | ({"probes": options.probes, "seeds": list(options.probe_seeds)} if target.probes else {})


def depth_result(target: Target, options: ReproduceOptions, depths: Depths) -> Result:
    """What figure 1, 2 or 4 writes."""
    found = depths.of(options.lengths_of(target))
    rows, arrays, comparison = _MAKERS[target.name](target.name, found)
    return Result(
        target=target.name,
        rows=rows,
        arrays=arrays,
        about=about(target, options, depths) | {"comparison": comparison},
    )


def about(target: Target, options: ReproduceOptions, depths: Depths) -> dict[str, Any]:
    """What is told of a target that is measured on prompts."""
    found = depths.of(options.lengths_of(target))
    return {
        "target": target.name,
        "title": target.title,
        "paper": f"arXiv 2510.06640, {target.paper}",
        "request": depth_request(target, options) | {"samples": sample_counts(found)},
        "choices": {
            "states": f"{options.states}: h^(L) {'after' if options.states == 'hf' else 'before'} the final norm; "
            "h^(0), the input of block 0, is state 0 and counts",
            "cka_estimator": options.cka_estimator,
            "cka_examples": "tokens of one sequence; HSIC is summed over sequences",
            "means": "similarities over sequences, adjacent cosine and V over tokens, then over tasks",
            "weights": "random, as transformers draws them" if options.init else "of the checkpoint",
        },
        "models": {key_of(depth): depth.choices for depth in found},
        "skipped": depths.skipped,
        "reading": reading_of(target.name),
    }


def like_the_papers(found: list[Depth]) -> Iterator[tuple[str, int, list[Depth]]]:
    """Model, length, and measurements that its numbers can stand beside: of a checkpoint, on both of its tasks."""
    for model, length, group in tasks_by_model(found):
        weights = {depth.choices["weights"] for depth in group}
        if weights == {"pretrained"} and {depth.task for depth in group} == set(TASKS):
            yield model, length, group


def key_of(depth: Depth) -> str:
    """A name for one measurement, also of its arrays."""
    return f"{depth.model}/{depth.task}/{depth.length}"


def pretrained_rows(depths: Sequence[Depth], updates: bool) -> list[dict[str, Any]]:
    """Rows of figures 3 and 5 for the checkpoint itself, means over tasks."""
    name, place = ("update_inter_token", "transition") if updates else ("inter_token", "state")
    return [
        {
            "model": model,
            "family": family(group[0].choices["blocks"]),
            "scheme": "pretrained",
            "policy": None,
            "norms": "baseline",
            "embedding_scale": 1.0,
            "seed": None,
            place: index,
            "value": value,
            "nonfinite": max(int(depth.extraction.snapshot.nonfinite[index + updates]) for depth in group),
        }
        for model, _, group in tasks_by_model(list(depths))
        for index, value in enumerate(mean_curve(group, name))
    ]


def family(blocks: Iterable[str]) -> str:
    """`SSM` or `TBM` for a model of state-space blocks or attention alone; of others the kind, or `hybrid`."""
    kinds = sorted(set(blocks))
    return {"ssm": "SSM", "attention": "TBM"}.get(kinds[0], kinds[0]) if len(kinds) == 1 else "hybrid"


def mean_curve(group: Sequence[Depth], name: str) -> Curve:
    """A statistic of the snapshot, over tasks."""
    return plain(torch.stack([getattr(depth.extraction.snapshot, name) for depth in group]).mean(0))


def _curves(name: str, place: str) -> Callable[[str, list[Depth]], Any]:
    def make(target: str, found: list[Depth]) -> tuple[list[Row], dict[str, np.ndarray], list[dict[str, Any]]]:
        rows = [row for depth in found for row in _curve_rows(depth, name, place)]
        arrays = {} if target != "figure1" else dict(_maps(found))
        alike = like_the_papers(found)
        curves = {model: mean_curve(group, name) for model, length, group in alike if length == PAPER_LENGTH}
        return rows, arrays, compare_curves(target, curves)

    return make


def _curve_rows(depth: Depth, name: str, place: str) -> Iterable[Row]:
    values: Tensor = getattr(depth.extraction.snapshot, name)
    for index, value in enumerate(plain(values)):
        yield {"model": depth.model, "task": depth.task, "length": depth.length, place: index, "value": value}


def _maps(found: list[Depth]) -> Iterable[tuple[str, np.ndarray]]:
    """Token × layer maps: `tokens` of the first prompt, and `positions`, bins of relative position, of all prompts."""
    for depth in found:
        yield f"{key_of(depth)}/tokens", depth.token_map
        yield f"{key_of(depth)}/positions", depth.extraction.snapshot.adjacent_tokens.float().numpy()


def _cka(target: str, found: list[Depth]) -> tuple[list[Row], dict[str, np.ndarray], list[dict[str, Any]]]:
    rows: list[Row] = []
    arrays: dict[str, np.ndarray] = {}
    for model, length, group in tasks_by_model(found):
        for depth in group:
            arrays[key_of(depth)] = depth.extraction.snapshot.cka.float().numpy()
            rows += _cka_rows(depth)
        if len(group) > 1:
            arrays[f"{model}/mean/{length}"] = np.mean([arrays[key_of(depth)] for depth in group], axis=0)
    alike = [model for model, length, _ in like_the_papers(found) if length == PAPER_LENGTH]
    return rows, arrays, compare_matrices(target, {model: arrays[f"{model}/mean/{PAPER_LENGTH}"] for model in alike})


def _cka_rows(depth: Depth) -> Iterable[Row]:
    """What a matrix says of each state: how like it is to the first one and to the one before."""
    snapshot = depth.extraction.snapshot
    top = plain(snapshot.hsic_top_token)
    for state in range(len(snapshot.cka)):
        first, before = plain(snapshot.cka[state, [0, max(state - 1, 0)]])
        yield {
            "model": depth.model,
            "task": depth.task,
            "length": depth.length,
            "state": state,
            "cka_with_state_0": first,
            "cka_with_state_before": before,
            "hsic_top_token": top[state],
        }


_MAKERS = {
    "figure1": _curves("adjacent", "transition"),
    "figure2": _curves("inter_token", "state"),
    "figure4": _cka,
}
