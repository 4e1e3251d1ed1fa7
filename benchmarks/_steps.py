"""What a training step costs: its time beside that of other variants, memory, synchronisations, and time of the CPU."""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from _models import Blocks

from repflow.monitor import Monitor, MonitorConfig

Step = Callable[[], None]


class CpuTime(NamedTuple):
    """Microseconds that a step of an almost empty model takes longer on the CPU."""

    sampled: float
    """A sampled step: hooks, and the launches of all statistics."""
    hooks: float
    """The same without the statistics: what the hooks do, and putting them on and off."""
    between: float
    """A step that is not sampled."""


def time_steps(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every step, in turns, so that a drift of the machine meets all alike. The first is a warm-up."""
    names = list(steps)
    marks: dict[str, list[tuple[object, object]]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = _mark(device)
            steps[name]()
            marks[name].append((start, _mark(device)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: [_elapsed_ms(*pair) for pair in pairs[1:]] for name, pairs in marks.items()}


def _mark(device: torch.device) -> object:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start: object, end: object) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end)
    assert isinstance(start, float) and isinstance(end, float)
    return 1e3 * (end - start)


def quantile(values: list[float], share: float) -> float:
    """The quantile of a list, between its two neighbours."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def difference(of: list[float], base: list[float]) -> tuple[float, float]:
    """Median difference of steps of the same round, and its standard error, as that of a median of normal values."""
    pairs = [one - other for one, other in zip(of, base, strict=True)]
    # The middle half tells the spread: a single interrupted step must not.
    spread = (quantile(pairs, 0.75) - quantile(pairs, 0.25)) / 1.349
    return statistics.median(pairs), 1.2533 * spread / math.sqrt(len(pairs))


def mean_difference(of: list[float], base: list[float]) -> tuple[float, float]:
    """Mean difference of steps of the same round, and its standard error."""
    pairs = [one - other for one, other in zip(of, base, strict=True)]
    return statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))


def peak_mib(step: Step, device: torch.device) -> float | None:
    """The most memory that is allocated during a step, on a CUDA device only."""
    if device.type != "cuda":
        return None
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def count_syncs(step: Step, device: torch.device) -> int | None:
    """How many operations of a step wait for the device, as PyTorch warns of them, on a CUDA device only."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(entry.message) for entry in caught)  # another message tells of the mode


def cpu_time(layers: int, config: MonitorConfig, rounds: int, device: torch.device) -> CpuTime:
    """What the monitor costs the CPU per step, with as many blocks as a model has."""
    model = Blocks(layers).to(device)
    x = torch.randn(4, 64, 16, device=device)
    monitors = {"sampled": Monitor(model, config), "hooks": Monitor(model, config)}
    monitors["between"] = Monitor(model, MonitorConfig(every_n_steps=10**9))
    monitors["hooks"]._capture.on_forward = lambda forward: None
    taken: dict[str, list[float]] = {name: [] for name in ("bare", *monitors)}
    for number in range(1, rounds + 6):
        for name in taken:
            start = time.perf_counter()
            if name == "bare":
                model(x)
            else:
                with monitors[name].step(number):
                    model(x)
            taken[name].append(1e6 * (time.perf_counter() - start))
            monitors["hooks"].discard()  # it has nothing to publish
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    for monitor in monitors.values():
        assert monitor.enabled
        monitor.close()
    bare = taken.pop("bare")[5:]
    return CpuTime(**{name: difference(values[5:], bare)[0] for name, values in taken.items()})
