"""Figures 3, 5, 6 and 7: rows and claims out of the streams of models drawn at random."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from repflow.monitor.offline.reproduce.claims import claims_of, unclaimed
from repflow.monitor.offline.reproduce.depth import Depth, Depths, sample_counts
from repflow.monitor.offline.reproduce.depth_targets import depth_request, family, key_of, pretrained_rows
from repflow.monitor.offline.reproduce.options import ReproduceOptions
from repflow.monitor.offline.reproduce.paper import PAPER_LENGTH, compare_random, reading_of
from repflow.monitor.offline.reproduce.streams import Stream, Streams, points_of, random_tokens
from repflow.monitor.offline.reproduce.targets import Target
from repflow.monitor.offline.reproduce.work import content_key
from repflow.monitor.offline.reproduce.written import Result

_MATTERS = ("schemes", "policies", "embeddings", "positions", "scaled_positions", "dtype")
_OF_A_ROW = ("seed", "scheme", "policy", "norms", "norms_changed", "embedding_scale", "parameters")
"""Choices that rows have a column for, and what follows from them."""
_CHOICES = {
    "protocol": "random_ids: uniform ids, one sequence for each seed of the weights, drawn from it",
    "states": "residual: before the final norm; h^(0), the input of block 0, is state 0 and counts",
    "initialisation": "matrices by the scheme; biases and norm affines by the policy; A_log, D, dt_bias and "
    "dt_proj.bias of state spaces as they are",
    "spread": "standard deviation over seeds (n − 1)",
}
WITH_CHECKPOINT = ("figure3", "figure5")
"""Figures that show the checkpoint too, where there is one; its scheme is `pretrained`."""


def random_request(target: Target, options: ReproduceOptions) -> dict[str, Any]:
    """What decides the rows of a target, but for the number of samples."""
    contents = {name: content for name in options.model_names if (content := content_key(name))}
    return {
        "models": list(options.model_names),
        **({"contents": contents} if contents else {}),
        "seeds": list(options.random_seeds),
        "tokens": random_tokens(options),
        **{name: getattr(options, name) for name in _MATTERS},
        "checkpoints": [] if options.init or target.name not in WITH_CHECKPOINT else depth_request(target, options),
    }


def random_result(target: Target, options: ReproduceOptions, streams: Streams, depths: Depths) -> Result:
    """What a target writes."""
    found = streams.of(points_of(target, options))
    updates = target.name == "figure5"
    drawn = [row for stream in found for row in _rows(stream, updates)]
    beside = depths.of(options.lengths_of(target)) if target.name in WITH_CHECKPOINT else []
    return Result(
        target=target.name,
        rows=[*drawn, *pretrained_rows(beside, updates)],
        about={
            "target": target.name,
            "title": target.title,
            "paper": f"arXiv 2510.06640, {target.paper}",
            "request": random_request(target, options) | {"samples": sample_counts(beside)},
            "quantity": "update_inter_token" if updates else "inter_token",
            "choices": _CHOICES | ({"pretrained": _said_of_checkpoints(beside, options)} if beside else {}),
            "models": {
                name: common(stream.choices for stream in found if stream.model == name) for name in _models(found)
            },
            "checkpoints": {key_of(depth): depth.choices for depth in beside},
            "skipped": [*streams.skipped, *(depths.skipped if target.name in WITH_CHECKPOINT else [])],
            "claims": claims_of(target.name, drawn),
            "unclaimed": unclaimed(target.name, drawn),
            "comparison": compare_random(target.name, drawn) if random_tokens(options) == PAPER_LENGTH else [],
            "reading": reading_of(target.name),
        },
    )


def common(choices: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What several descriptions say: where they differ, each value once, but for what rows tell of themselves."""
    values: dict[str, list[Any]] = defaultdict(list)
    for choice in choices:
        for name, value in choice.items():
            if value not in values[name]:
                values[name].append(value)
    return {
        name: found[0] if len(found) == 1 else found
        for name, found in values.items()
        if len(found) == 1 or name not in _OF_A_ROW
    }


def _said_of_checkpoints(depths: Sequence[Depth], options: ReproduceOptions) -> str:
    prompts = "random ids" if options.random_prompts else f"prompts of {' and '.join(options.prompt_tasks)}"
    lengths = ", ".join(f"{length:,}" for length in dict.fromkeys(depth.length for depth in depths))
    return (
        f"the checkpoint, on {prompts} of about {lengths} tokens, not on the ids of the models drawn at random; "
        f"states: {options.states}"
    )


def _models(streams: Sequence[Stream]) -> list[str]:
    return list(dict.fromkeys(stream.model for stream in streams))


def _rows(stream: Stream, updates: bool) -> list[dict[str, Any]]:
    values = stream.update_inter_token if updates else stream.inter_token
    same = {
        "model": stream.model,
        "family": family(stream.choices["blocks"]),
        "scheme": stream.point.scheme,
        "policy": stream.point.policy,
        "norms": stream.point.norms,
        "embedding_scale": float(stream.point.embedding_scale),
        "seed": stream.seed,
    }
    place = "transition" if updates else "state"
    return [
        same | {place: index, "value": value, "nonfinite": stream.nonfinite[index + updates]}
        for index, value in enumerate(values)
    ]
