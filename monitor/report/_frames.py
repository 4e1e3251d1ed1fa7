"""What the page's slider runs through: a few snapshots of each run, with matrices and curves over depth."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repflow.monitor.report._axes import Floats
from repflow.monitor.report._runs import Run
from repflow.monitor.report._thin import FRAMES, rounded, spread

CURVES = ("inter_token", "update_inter_token", "adjacent", "norms", "drift_first", "drift_previous")
QUANTILES = ("ssm_memory", "ssm_decay")
UNIT = 1e-4
"""Cosines and CKA are stored as integers of this unit: four decimals in half the characters."""


def frame_indices(run: Run) -> NDArray[np.int64]:
    """Indices of at most `FRAMES` snapshots, the first and the last among them, of those with CKA if any has it."""
    every = np.arange(len(run.steps))
    measured = every[np.isfinite(run.data["cka"].values).any(axis=(1, 2))]
    found = np.union1d(measured, every[[0, -1]]) if measured.size else every
    return found[spread(len(found), FRAMES)]


def frames(run: Run) -> dict[str, Any]:
    """The run as the page's script reads it: its frames, and what comparing it with others takes."""
    indices = frame_indices(run)
    bins = position_bins(run, indices)
    return {
        "depth": run.depth,
        "estimator": str(run.data.attrs["cka_estimator"]),
        "steps": run.steps[indices].tolist(),
        "cka": [_triangle(matrix) for matrix in run.data["cka"].values[indices]],
        "tokens": [_integers(values[:, bins].T) for values in run.data["adjacent_tokens"].values[indices]],
        "positions": rounded(run.values("position")[bins], digits=6),
        "curves": {name: rounded(run.data[name].values[indices], digits=5) for name in CURVES if name in run.data},
        "quantiles": {
            name: rounded(run.data[name].values[indices].swapaxes(1, 2)) for name in QUANTILES if name in run.data
        },
    }


def position_bins(run: Run, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bins of relative position that hold tokens: sequences of fewer tokens than bins leave some empty."""
    return np.flatnonzero(np.isfinite(run.data["adjacent_tokens"].values[indices]).any(axis=(0, 1)))


def _triangle(matrix: Floats) -> list[list[int | None]]:
    """Lower triangle of a symmetric matrix."""
    return [row[: index + 1] for index, row in enumerate(_integers(matrix))]


def _integers(values: Floats) -> list[list[int | None]]:
    return [[round(value / UNIT) if np.isfinite(value) else None for value in row] for row in values.tolist()]
