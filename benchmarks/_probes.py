"""The training of probes: its time, and whether each learns what it would learn by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _measure import run_once
from _steps import quantile
from torch import Tensor
from torch.nn.functional import cross_entropy

TOLERANCE = 0.005
"""Of an accuracy, against that in float64: rounding moves samples that lie at a border."""


@dataclass(frozen=True)
class ProbeCase:
    """Features that hold the class, the better the later the state."""

    states: int
    samples: int
    features: int
    classes: int
    seeds: int = 5
    epochs: int = 150
    budget: float | None = None
    """Unit: seconds."""

    @property
    def name(self) -> str:
        """In words."""
        return f"probes, {self.states} states × {self.seeds} seeds"


CASES = (ProbeCase(65, 20_000, 2560, 11, budget=10.0), ProbeCase(33, 20_000, 2560, 11))
QUICK_CASES = (ProbeCase(3, 400, 16, 4, seeds=2, budget=10.0),)


def measure_probes(case: ProbeCase, rounds: int, device: torch.device) -> dict[str, object]:
    """The row of one problem: seconds from features in host memory to accuracies.

    Raises:
        RuntimeError: an accuracy differs from that of the same probe in float64 by more than is allowed.
    """
    from repflow.monitor.offline.probing import ProbeOptions, train_probes

    features, labels = planted(case, device)
    options = ProbeOptions(seeds=tuple(range(case.seeds)), epochs=case.epochs)

    def take(wanted: Sequence[int]) -> Tensor:
        return features[wanted[0] : wanted[-1] + 1]

    def train(states: int) -> Any:
        return train_probes(take, states, labels, np.arange(case.samples), options, device=device)

    train(1)  # warms up
    runs = [run_once(lambda: train(case.states), device) for _ in range(min(rounds, 3))]
    error = max(
        abs(float(runs[0].result.accuracy[state, seed]) - alone(features[state], labels, options, seed, device))
        for state, seed in ((case.states // 2, 0), (case.states - 1, case.seeds - 1))
    )
    mean = runs[0].result.mean
    print(f"  accuracy from {mean.min():.3f} to {mean.max():.3f}, at most {error:.4f} from float64", flush=True)
    if not error <= TOLERANCE:
        raise RuntimeError(f"no time is shown, for an accuracy is {error:.4f} from that in float64")
    return {
        "part": "probes", "name": case.name, "states": case.states, "features": case.features,
        "samples": case.samples, "classes": case.classes, "seeds": case.seeds, "epochs": case.epochs,
        "seconds": quantile([run.ms / 1e3 for run in runs], 0.5), "budget": case.budget, "runs": len(runs),
        "memory_mib": runs[0].memory_mib, "error_share_of_tolerance": error / TOLERANCE, "checked": "yes",
    }  # fmt: skip


def planted(case: ProbeCase, device: torch.device) -> tuple[Tensor, Any]:
    """Features `[S, N, D]` in host memory, in bf16 as an extraction leaves them, and labels `[N]`."""
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.arange(case.samples, device=device) % case.classes
    means = torch.randn(case.classes, case.features, generator=generator, device=device)
    scale = torch.logspace(-1, 1, case.features, device=device)
    features = torch.empty(case.states, case.samples, case.features, dtype=torch.bfloat16)
    apart = 4 / math.sqrt(2 * case.features)  # so that classes are 4 standard deviations apart at the last state
    for number, state in enumerate(features):
        noise = torch.randn(case.samples, case.features, generator=generator, device=device)
        state.copy_((noise + apart * (number + 1) / case.states * means[labels]) * scale)
    return features, labels.cpu().numpy()


def alone(features: Tensor, labels: Any, options: Any, seed: int, device: torch.device) -> float:
    """Accuracy of one probe by itself in float64, on features that are standardised before."""
    from repflow.monitor.offline.probe_split import stratified_group_split

    split = stratified_group_split(labels, np.arange(len(labels)), validation=options.validation, seed=seed)
    held, y = torch.from_numpy(split).to(device), torch.from_numpy(labels).to(device)
    x = features.to(device, torch.float64)
    x = (x - x[~held].mean(0)) / x[~held].std(0, correction=0)
    width, classes = x.shape[1], int(y.max()) + 1
    drawn = torch.rand(width + 1, classes, generator=torch.Generator().manual_seed(seed)).to(device, torch.float64)
    weight = ((2 * drawn - 1) / math.sqrt(width)).requires_grad_()  # as torch.nn.Linear; the bias is the last row
    adam = torch.optim.Adam([weight], options.learning_rate)
    for _ in range(options.epochs):
        adam.zero_grad()
        cross_entropy(x[~held] @ weight[:-1] + weight[-1], y[~held]).backward()
        adam.step()
    right = (x[held] @ weight[:-1] + weight[-1]).argmax(-1) == y[held]
    return float(right.double().mean())
