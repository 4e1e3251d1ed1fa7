"""Extraction beside the bare forward pass: models, the two in turns, and whether what is extracted is right."""

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _check import shares_of_tolerance
from _measure import run_once
from _steps import quantile

BUDGETS = {"without CKA": 95.0, "with CKA": 90.0}
"""Least percent of the bare forward's tokens per second, of models that are large."""


@dataclass(frozen=True)
class ExtractionCase:
    """A model, and what runs through it."""

    name: str
    model: str
    """Of `PAPER_MODELS`; or a configuration as JSON."""
    tokens: int
    """Of each sequence."""
    sequences: int
    batch_tokens: int
    chunk: int | None = None
    """Tokens of a chunk of Mamba-2's scan without its kernels, whose time and memory grow with it.

    With the kernels a batch has four times as many tokens, and there are four times as many sequences: smaller ones
    keep the CPU busy, not the GPU.
    """
    large: bool = False
    """Whether the budgets are for it."""


CASES = (
    ExtractionCase("Pythia 2.8B", "pythia-2.8b", 2048, 128, 16384, large=True),
    ExtractionCase("Mamba2 2.7B", "mamba2-2.7b", 2048, 16, 4096, chunk=32, large=True),
    ExtractionCase("Mamba2 130M", "mamba2-130m", 2048, 32, 8192, chunk=32),
)
_TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
QUICK_CASES = (
    ExtractionCase(
        "GPTNeoX tiny",
        json.dumps({"model_type": "gpt_neox", **_TINY, "num_attention_heads": 2, "intermediate_size": 32}),
        8, 2, 8, large=True,
    ),
    ExtractionCase(
        "Mamba2 tiny",
        json.dumps({"model_type": "mamba2", **_TINY, "state_size": 4, "num_heads": 2, "head_dim": 16, "n_groups": 1}),
        8, 2, 16, chunk=4,
    ),
)  # fmt: skip


def measure_extraction(case: ExtractionCase, rounds: int, device: torch.device) -> list[dict[str, object]]:
    """The rows of one model.

    Raises:
        RuntimeError: an extraction differs from the reference by more than is allowed.
    """
    from repflow.monitor.offline.extraction import ExtractionOptions, extract
    from repflow.monitor.offline.recorder import OFFLINE_METRICS
    from repflow.triton_kernels._dispatch import force

    loaded = load(case, device)
    if case.chunk and fused_scan():
        case = replace(case, batch_tokens=4 * case.batch_tokens, sequences=4 * case.sequences)
    samples = random_samples(case.sequences, case.tokens, loaded.vocabulary)
    without = tuple(metric for metric in OFFLINE_METRICS if metric != "cka")
    both = {"without CKA": without, "with CKA": OFFLINE_METRICS}
    options = {name: ExtractionOptions(metrics=chosen, batch_tokens=case.batch_tokens) for name, chosen in both.items()}
    with force("triton") if device.type == "cpu" else nullcontext(), tempfile.TemporaryDirectory() as folder:
        error = check(loaded, case, options["with CKA"], Path(folder) / "checked")
        numbers = count()
        calls: dict[str, Callable[[], Any]] = {"bare": lambda: forward_all(loaded, case, samples)}
        for name, choice in options.items():
            calls[name] = lambda choice=choice: extract(loaded, samples, Path(folder) / str(next(numbers)), choice)
        times = time_in_turns(calls, rounds, device)
    return [{**describe(case, loaded), **rates(name, case, times), "error_share_of_tolerance": error, "checked": "yes"}
            for name in calls]  # fmt: skip


def time_in_turns(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call, so that a drift of the machine meets all alike. The first round is a warm-up."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(run_once(calls[name], device).ms / 1e3)
    return {name: taken[1:] for name, taken in times.items()}


def describe(case: ExtractionCase, loaded: Any) -> dict[str, object]:
    """What the rows of a model have in common."""
    from repflow.monitor import find_residual_stream

    scan = "kernels of mamba_ssm" if fused_scan() else f"scan in PyTorch, chunks of {case.chunk} tokens"
    return {
        "part": "extraction", "name": case.name, "states": len(find_residual_stream(loaded.model)) + 1,
        "features": loaded.config.hidden_size, "samples": case.sequences, "tokens": case.tokens,
        "batch_tokens": case.batch_tokens, "note": scan if case.chunk else "",
    }  # fmt: skip


def rates(name: str, case: ExtractionCase, times: dict[str, list[float]]) -> dict[str, object]:
    """What was measured of one variant."""
    shares = [100 * bare / taken for bare, taken in zip(times["bare"], times[name], strict=True)]
    middle = quantile(times[name], 0.5)
    return {
        "variant": name, "seconds": middle, "tokens_per_second": case.sequences * case.tokens / middle,
        "percent_of_bare": quantile(shares, 0.5), "percent_low": min(shares), "percent_high": max(shares),
        "budget": BUDGETS.get(name) if case.large else None, "runs": len(shares),
    }  # fmt: skip


def load(case: ExtractionCase, device: torch.device) -> Any:
    """The model with random weights, in bf16; in float32 on a CPU."""
    from repflow.monitor.offline.loading import load_model

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        name = case.model
        if name.startswith("{"):
            name = str(Path(folder) / "config.json")
            Path(name).write_text(case.model, encoding="utf-8")
        loaded = load_model(name, init=True, dtype=dtype, device=device)
    if case.chunk and not fused_scan():
        mixers: list[Any] = [module for module in loaded.model.modules() if hasattr(module, "chunk_size")]
        for mixer in mixers:
            mixer.chunk_size = case.chunk
    return loaded


def fused_scan() -> bool:
    """Whether transformers finds the kernels of Mamba-2."""
    return find_spec("mamba_ssm") is not None and find_spec("causal_conv1d") is not None


def random_samples(sequences: int, tokens: int, vocabulary: int) -> Any:
    """Random ids, all sequences of one length."""
    from repflow.monitor.offline.tasks_length import EncodedSamples

    ids = np.random.default_rng(0).integers(0, vocabulary, (sequences, tokens), dtype=np.int32)
    zeros = np.zeros(sequences, dtype=np.int64)
    return EncodedSamples(list(ids), zeros, zeros, np.arange(sequences), zeros)


def forward_all(loaded: Any, case: ExtractionCase, samples: Any) -> None:
    """The batches of an extraction, through the model and no further."""
    from repflow.monitor.offline.batching import pad, plan_batches

    with torch.no_grad():
        for batch in plan_batches([len(row) for row in samples.ids], case.batch_tokens):
            ids, _ = pad([samples.ids[index] for index in batch])
            if loaded.device.type == "cuda":
                ids = ids.pin_memory().to(loaded.device, non_blocking=True)
            loaded.model(input_ids=ids, use_cache=False)


def check(loaded: Any, case: ExtractionCase, options: Any, folder: Path) -> float:
    """The largest error of an extraction of two sequences, as a share of what is allowed.

    Raises:
        RuntimeError: it is above 1, or features are not those of the reference.
    """
    from repflow.monitor import Snapshot
    from repflow.monitor.offline.batching import pad
    from repflow.monitor.offline.extraction import extract
    from repflow.monitor.offline.recorder import StateRecorder
    from repflow.triton_kernels._dispatch import force

    samples = random_samples(2, case.tokens, loaded.vocabulary)
    found = extract(loaded, samples, folder, options)
    with force("reference"), StateRecorder(loaded.model, features=True) as recorder:
        ids, _ = pad(samples.ids)
        want = recorder.measure(ids.to(loaded.device), rows=min(2, case.batch_tokens // case.tokens))
        states = recorder.layout.num_states
    reference = Snapshot.from_sums(want.sums.cpu(), num_states=states, step=0, stream="", overhead_ms=0.0)
    assert want.features is not None
    errors = shares_of_tolerance(found.snapshot, reference, want.features.dtype)
    print("  error/allowed: " + ", ".join(f"{name} {share:.2g}" for name, share in errors.items()), flush=True)
    if wrong := [name for name, share in errors.items() if not share <= 1]:
        raise RuntimeError(f"no time is shown, for these differ from the reference: {', '.join(wrong)}")
    if not torch.equal(found.features(range(states)), want.features.cpu()):
        raise RuntimeError("no time is shown, for the features are not those of the reference")
    return max(errors.values())
