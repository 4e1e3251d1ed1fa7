"""What an extraction found, read from its folder: statistics, labels, and the features of any layer."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.parts import SAMPLES, UNREADABLE, Part, PartStore, read_manifest
from repflow.monitor.offline.tasks_length import EncodedSamples
from repflow.monitor.snapshot import Snapshot
from repflow.monitor.sum_layout import SumLayout
from repflow.monitor.warning import warn

_COLUMNS = ("labels", "positions", "contexts", "tokens")


@dataclass(frozen=True, eq=False)
class Extraction:
    """A finished extraction."""

    folder: Path
    snapshot: Snapshot
    """The statistics over all samples."""
    labels: Int64[np.ndarray, " N"]
    positions: Int64[np.ndarray, " N"]
    """Of the gold items."""
    contexts: Int64[np.ndarray, " N"]
    tokens: Int64[np.ndarray, " N"]
    """Length of each sample. Unit: tokens."""
    choices: dict[str, Any]
    """What was chosen, and what was loaded."""
    _parts: tuple[Part, ...]

    @classmethod
    def open(cls, folder: Path) -> "Extraction":
        """Read a folder.

        Raises:
            OfflineError: it holds no extraction, or one that is not finished, or damaged.
        """
        manifest = read_manifest(folder)
        parts = PartStore(folder, manifest["key"]["parts"]).whole()
        layout = SumLayout(manifest["key"]["num_states"])
        total = layout.zeros()
        for part in parts:
            layout.merge_(total, part.sums)
        snapshot = Snapshot.from_sums(
            total, num_states=layout.num_states, step=0, stream=manifest["key"]["stream"], overhead_ms=0.0
        )
        labels, positions, contexts, tokens = _read_samples(folder)
        choices = manifest["key"] | manifest["about"]
        choices["forward_tokens"] = min(part.forward_tokens for part in parts)  # less than a batch: memory ran out
        return cls(folder, snapshot, labels, positions, contexts, tokens, choices, parts)

    def features(self, states: Sequence[int]) -> Float[Tensor, "layers N D"]:
        """The last token's state of every sample, in the order of the samples, at some of the S states.

        Raises:
            OfflineError: features were not kept.
        """
        if any(part.features is None for part in self._parts):
            raise OfflineError(f"{self.folder}: expected the features of last tokens, and none were kept")
        index = torch.tensor(list(states))
        found: Tensor | None = None
        for part in self._parts:
            assert part.features is not None
            if found is None:
                found = part.features.new_empty(len(index), len(self.labels), part.features.shape[-1])
            found[:, part.samples] = part.features[index]
        assert found is not None
        return found


def save_samples(folder: Path, samples: EncodedSamples) -> None:
    """Keep what is known of the samples, but for their tokens."""
    lengths = np.array([len(row) for row in samples.ids], dtype=np.int64)
    columns = (samples.labels, samples.positions, samples.contexts, lengths)
    partial = folder / "samples.partial"
    torch.save(dict(zip(_COLUMNS, map(torch.from_numpy, map(np.ascontiguousarray, columns)), strict=True)), partial)
    os.replace(partial, folder / SAMPLES)


def _read_samples(folder: Path) -> list[Int64[np.ndarray, " N"]]:
    """What `save_samples` kept."""
    try:
        columns = torch.load(folder / SAMPLES, weights_only=True)
        return [columns[name].numpy() for name in _COLUMNS]
    except UNREADABLE as error:
        told = f"{folder / SAMPLES} is damaged ({type(error).__name__})"
        warn(f"{told}; it is written again when the extraction is started again")
        raise OfflineError(f"{told}: expected the labels of the samples; start the extraction again") from error
