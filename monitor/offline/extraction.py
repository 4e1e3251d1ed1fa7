"""Runs a model over the samples of a task, and keeps sums and last-token states: never a dataset of full states."""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import repflow
from repflow.monitor.config import Metric, StatesConvention
from repflow.monitor.delivery import Ready, copy_to_host, on_device
from repflow.monitor.offline import BeyondWindowError, OfflineError
from repflow.monitor.offline.batching import pad, plan_batches
from repflow.monitor.offline.extracted import Extraction, save_samples
from repflow.monitor.offline.loading import LoadedModel
from repflow.monitor.offline.memory import free_memory, is_out_of_memory
from repflow.monitor.offline.parts import Part, PartStore, check_folder, prepare_folder
from repflow.monitor.offline.processes import Processes, shared_processes
from repflow.monitor.offline.progress import WorkProgress
from repflow.monitor.offline.recorder import OFFLINE_METRICS, Measured, StateRecorder
from repflow.monitor.offline.tasks_length import EncodedSamples
from repflow.monitor.warning import warn
from repflow.triton_kernels.hsic import Estimator


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions:
    """What is measured, and in batches of what size.

    Raises:
        OfflineError: a batch without tokens, or a metric that is not measured offline.
    """

    metrics: tuple[Metric, ...] = OFFLINE_METRICS
    """Which families to compute; none for features alone. Norms and counts always are."""
    states: StatesConvention = "residual"
    """`residual`: h^(L) is the output of the last block. `hf`: it is taken after the final norm."""
    cka_estimator: Estimator = "unbiased"
    skip_first_tokens: int = 0
    """Leave out the first tokens of every sequence from the statistics."""
    features: bool = True
    """Keep the state of each sample's last token at every layer, for probes."""
    batch_tokens: int = 16384
    """Most tokens of one forward, padding included; a longer sequence has one of its own."""

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise OfflineError(f"--batch-tokens: expected 1 or more, got {self.batch_tokens}")
        if unknown := [metric for metric in self.metrics if metric not in OFFLINE_METRICS]:
            raise OfflineError(f"metrics: expected some of {', '.join(OFFLINE_METRICS)}, got {unknown[0]!r}")

    def describe(self) -> dict[str, Any]:
        """Every choice, as plain values."""
        return {
            "metrics": list(self.metrics),
            "states": self.states,
            "cka_estimator": self.cka_estimator,
            "skip_first_tokens": self.skip_first_tokens,
            "features": self.features,
            "batch_tokens": self.batch_tokens,
        }


def extract(
    loaded: LoadedModel,
    samples: EncodedSamples,
    folder: Path,
    options: ExtractionOptions | None = None,
    *,
    about: dict[str, Any] | None = None,
    console: Console | None = None,
) -> Extraction:
    """Measure the states of a model on the samples, into `folder`, from where an earlier attempt stopped.

    Each batch is one file, whose content depends on nothing but the model, the samples and the options. The sums of all
    are added up in order. So a run that was killed and started again gives the same bits as one that was not, and so do
    several processes (torchrun) as one, as far as the model itself gives the same bits twice and memory suffices.

    Out of memory, a batch is run in halves, and those after it too.

    Args:
        loaded: the model.
        samples: as tokens.
        folder: for this extraction alone.
        options: what to measure.
        about: further plain values to keep with it, such as the task's description.
        console: for the progress; none is shown if None, nor by other processes than the first.

    Raises:
        BeyondWindowError: a sample is longer than the window of the model.
        OfflineError: `folder` holds something else, a single sequence does not fit into memory, the model cannot be
            followed or does not know a token, or another process has ended.
    """
    options = options or ExtractionOptions()
    _check(loaded, samples)
    batches = plan_batches([len(row) for row in samples.ids], options.batch_tokens)
    recorder = StateRecorder(
        loaded.model,
        metrics=options.metrics,
        states=options.states,
        cka_estimator=options.cka_estimator,
        skip_first_tokens=options.skip_first_tokens,
        features=options.features,
    )
    stream = {"parts": len(batches), "stream": recorder.stream.name, "num_states": recorder.layout.num_states}
    key = stream | options.describe() | _identity(loaded, samples)
    with shared_processes() as processes, on_device(loaded.device), recorder:
        if not processes.rank:
            prepare_folder(folder, key, loaded.describe() | (about or {}))
            save_samples(folder, samples)
        processes.wait()
        check_folder(folder, key)
        store = PartStore(folder, len(batches))
        _Run(loaded, samples, batches, recorder, store, options.batch_tokens).share(processes, console)
        processes.wait()
    return Extraction.open(folder)


def _check(loaded: LoadedModel, samples: EncodedSamples) -> None:
    """Raise an OfflineError where the model is not made for the samples: not every model would say so."""
    if not len(samples):
        raise OfflineError("expected one sample or more to run the model on, got none")
    longest, largest = max(map(len, samples.ids)), max(int(row.max(initial=0)) for row in samples.ids)
    if loaded.window is not None and longest > loaded.window:
        raise BeyondWindowError(f"{loaded.name}: skipped {longest:,} tokens: the model's window is {loaded.window:,}")
    if largest >= loaded.vocabulary:
        raise OfflineError(
            f"{loaded.name}: expected tokens among the {loaded.vocabulary} that the model knows, got {largest}; name "
            "the tokenizer that it was trained with"
        )


def _identity(loaded: LoadedModel, samples: EncodedSamples) -> dict[str, Any]:
    """What the parts of an extraction depend on, besides the options."""
    digest = hashlib.blake2b(digest_size=16)
    for row in samples.ids:
        digest.update(len(row).to_bytes(8, "little") + row.tobytes())
    for column in (samples.labels, samples.positions, samples.contexts):
        digest.update(column.tobytes())
    return {
        "weights_hash": loaded.fingerprint(),
        "samples": len(samples),
        "samples_hash": digest.hexdigest(),
        "device": loaded.device.type,
        "versions": {
            "repflow": repflow.__version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
    }


@dataclass(eq=False)
class _Run:
    """The part of an extraction that this process does."""

    loaded: LoadedModel
    samples: EncodedSamples
    batches: list[Any]
    recorder: StateRecorder
    store: PartStore
    forward_tokens: int
    """Most tokens of a forward, padding included: halved when memory runs out."""

    def share(self, processes: Processes, console: Console | None) -> None:
        """Do every `world`-th part, but for those that are there."""
        done = self.store.done()
        self.forward_tokens = min([self.forward_tokens, *(part.forward_tokens for part in done.values())])
        mine = range(processes.rank, len(self.batches), processes.world)
        tokens = {number: sum(len(self.samples.ids[index]) for index in self.batches[number]) for number in mine}
        label = self.loaded.name if processes.world == 1 else f"{self.loaded.name}, process 1 of {processes.world}"
        before = sum(count for number, count in tokens.items() if number in done)
        with WorkProgress(console if not processes.rank else None, label, sum(tokens.values()), before) as bar:
            for number, part in self._measured(number for number in mine if number not in done):
                self.store.write(number, part)
                bar.advance(part.tokens)

    def _measured(self, numbers: Iterable[int]) -> Iterable[tuple[int, Part]]:
        """The parts of these numbers: each while the next one is already being measured."""
        arriving: _Arriving | None = None
        for number in numbers:
            leaving, arriving = arriving, self._start(number)
            if leaving is not None:
                yield leaving.number, leaving.wait()
        if arriving is not None:
            yield arriving.number, arriving.wait()

    def _start(self, number: int) -> "_Arriving":
        """Measure a part, with its results on their way to the host."""
        ids, mask = pad([self.samples.ids[index] for index in self.batches[number]])
        tokens = ids.numel() if mask is None else int(mask.sum())
        ids, mask = _to(ids, self.loaded.device), None if mask is None else _to(mask, self.loaded.device)
        measured: Measured | None = None
        while measured is None:
            rows = max(1, self.forward_tokens // ids.shape[1])
            try:
                measured = self.recorder.measure(ids, mask, rows=min(rows, len(ids)))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if measured is None:  # out of the exception, whose traceback holds what was allocated
                self._halve(min(rows, len(ids)), ids.shape[1])
        with on_device(measured.sums.device):
            kept = [values for values in (measured.sums, measured.features) if values is not None]
            return _Arriving(
                number,
                torch.from_numpy(self.batches[number]),
                [_send(values) for values in kept],
                tokens,
                self.forward_tokens,
            )

    def _halve(self, rows: int, tokens: int) -> None:
        self.recorder.release()
        free_memory()
        if rows == 1:
            raise OfflineError(
                f"out of memory with a single sequence of {tokens:,} tokens; take a smaller dtype, several GPUs "
                "(--device-map auto), a smaller length, or leave CKA out"
            )
        self.forward_tokens = rows // 2 * tokens
        warn(f"out of memory with {rows} sequences of {tokens:,} tokens at once: goes on with {rows // 2}")


@dataclass(eq=False)
class _Arriving:
    """A part on its way from the device."""

    number: int
    samples: Tensor
    kept: list[tuple[Tensor, Ready | None]]
    """The sums, and the features if they are wanted."""
    tokens: int
    forward_tokens: int

    def wait(self) -> Part:
        for _, ready in self.kept:
            if ready is not None:
                ready.synchronize()
        sums, *features = (values for values, _ in self.kept)
        return Part(
            samples=self.samples,
            sums=sums,
            features=features[0] if features else None,
            tokens=self.tokens,
            forward_tokens=self.forward_tokens,
        )


def _to(values: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that does not wait for what runs there."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _send(values: Tensor) -> tuple[Tensor, Ready | None]:
    return copy_to_host(values) if values.device.type == "cuda" else (values.cpu(), None)
