"""From a measured step to its snapshot in the sinks: over ranks, off the device, and told where it is none."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from repflow.monitor.config import Metric, MonitorConfig
from repflow.monitor.delivery import Delivery, MeasuredStep
from repflow.monitor.notices import (
    ALONE,
    different_steps,
    documents_left_out,
    misread_mask,
    recorded_nothing,
    sequences_left_out,
    short_sequences,
    silent_ranks,
    tell,
    unread_decays,
)
from repflow.monitor.ranks import MAX_SCALARS, CollectiveError, Part, Ranks, find_ranks, is_first_rank
from repflow.monitor.residual_stream import ResidualStream
from repflow.monitor.sequence_shards import SequenceGroup
from repflow.monitor.signatures import SignatureBook
from repflow.monitor.sinks import AbstractSink
from repflow.monitor.snapshot import RunInfo, Snapshot
from repflow.monitor.warning import WarnOnce

if TYPE_CHECKING:
    import torch


class Publication:
    """Sends measured steps off, adds them up over ranks, and hands what arrives to the sinks, in order.

    Args:
        run: what is monitored.
        stream: its residual stream.
        config: what is measured.
        sink: where the snapshots go.
        signatures: judges them.
        group: the ranks that share a batch; the default group if None.
        sequences: those of them that hold slices of the same sequences; None where all have whole ones.
        resident: whether the model is compiled, with taps in it.
        warn: says what is wrong with a step.
        failed: called with an exception that ends monitoring.
    """

    def __init__(
        self,
        run: RunInfo,
        stream: ResidualStream,
        config: MonitorConfig,
        sink: AbstractSink,
        signatures: SignatureBook,
        *,
        group: "torch.distributed.ProcessGroup | None",
        sequences: SequenceGroup | None = None,
        resident: bool,
        warn: WarnOnce,
        failed: Callable[[Exception], None],
    ) -> None:
        self.latest: Snapshot | None = None
        self.stopped = False
        """Nothing more is measured on this rank. It brings zeros from then on."""
        self.late_ms = 0.0
        """Time that the monitor took between sampled steps: counted with the next one that arrives."""
        self.packed: bool | None = None
        """Whether integer masks tell documents apart, as far as what has arrived tells; None: not known yet."""
        self._run, self._stream, self._config, self._layout = run, stream, config, run.layout
        self._sink, self._signatures, self._group, self._resident = sink, signatures, group, resident
        self.sequences, self._warn, self._failed = sequences, warn, failed
        self._started = False
        self._delivery = Delivery()
        self._ranks: Ranks | None = None  # from the first sampled step on
        self._joined = not config.reduce

    @property
    def meets_others(self) -> bool:
        """Whether other ranks wait for what this one publishes."""
        return self._ranks is not None

    @property
    def in_flight(self) -> bool:
        """Whether something was sent that has not arrived."""
        return bool(self._delivery)

    def join(self) -> None:
        """Join the other ranks, if any; once."""
        if not self._joined:
            self._joined = True
            key = f"{self._layout.size} sums every {self._config.every_n_steps} steps"
            if self.sequences is not None:
                key = f"{key}, {self.sequences.size} of sequences"
            self._ranks = find_ranks(self._layout, self._group, self._stream.blocks[0].module, key, self.sequences)

    def leave(self) -> None:
        """Meet the other ranks no more."""
        self._ranks = None

    def send(self, step: MeasuredStep) -> None:
        """The results of a step that has ended leave the device. Waits for nothing."""
        if self._ranks is not None and not self._ranks.agreed():
            self._ranks = None
            self._warn(ALONE)
        if self._ranks is not None:
            self._reduce(step, self._ranks)
        elif not self.stopped and step.sums is not None:
            self._delivery.send(step)
        elif not self.stopped:
            self._recorded_nothing(step)

    def collect(self, metrics: tuple[Metric, ...], *, wait: bool = False) -> None:
        """Turn what has arrived into snapshots, in order, and hand them to the sinks.

        Args:
            metrics: those that have not failed.
            wait: until everything that was sent has arrived.
        """
        sliced = self.sequences is not None
        for step, values in self._delivery.receive(wait=wait):
            if step.reduced and (values := self._merge(step, values)) is None:
                continue
            sums = self._layout.views(values[: self._layout.size])
            self._look_for_documents(step, sums)
            if misread := misread_mask(step.number, sums, sliced=sliced):
                if not sliced:
                    self._warn(misread, key="misread mask")
                elif not self.stopped:
                    self._failed(ValueError(misread))
                continue
            snapshot = step.snapshot(values, self._layout, self._stream.name, self.late_ms)
            self.latest = self._signatures.judged(snapshot, self._run.blocks)
            self.late_ms = 0.0
            left_out = sequences_left_out if sliced else documents_left_out
            if said := left_out(self.latest, sums):
                self._warn(said, key="documents")
            if short := short_sequences(self.latest, sums, self._config.cka_estimator, sliced=sliced):
                self._warn(short, key="short sequences")
            if "ssm" in metrics and (unread := unread_decays(self.latest, sums, self._run)):
                self._warn(unread, key="unread decays")
            if not self._started:
                self._started = True
                self._sink.start(self._run)
            self._sink.write(self.latest)
            if is_first_rank():
                tell(self.latest.alerts)

    def forget(self) -> None:
        """Wait no more for what has not arrived."""
        self._delivery.clear()

    def stop(self, error: Exception) -> None:
        """After a failure of the monitor: goes on meeting the other ranks, if they can be reached."""
        self.stopped = True
        if isinstance(error, CollectiveError):
            self._ranks = None
        if self._ranks is None:
            self._delivery.clear()

    def _look_for_documents(self, step: MeasuredStep, sums: dict[str, Tensor]) -> None:
        """Where integer masks turn out to tell padding only, the kernels may take them as that, which costs less."""
        if sums["document_max"] > 1 or sums["mask_max"] > 1:
            self.packed = True
        elif self.packed is None and step.sums is not None and step.sums.counted_documents:
            self.packed = False

    def _recorded_nothing(self, step: MeasuredStep) -> None:
        first = self._stream.blocks[0].name
        self._warn(recorded_nothing(step, first, self._resident), key="recorded nothing")

    def _reduce(self, step: MeasuredStep, ranks: Ranks) -> None:
        """Start adding up the sums of a step over ranks. Comes to that whatever else fails: the others wait for it."""
        for name in list(step.scalars)[MAX_SCALARS:]:
            del step.scalars[name]
            self._warn(
                f"left out {name!r}: expected at most {MAX_SCALARS} scalars to average over ranks", key="scalars"
            )
        part = Part.STOPPED if self.stopped else Part.MEASURED if step.sums is not None else Part.NOTHING
        try:
            wire = ranks.pack(step, part)
        except Exception as error:
            self._failed(error)
            step = MeasuredStep(step.number)
            wire = ranks.pack(step, Part.STOPPED)
        step.reduced = True
        self._delivery.expect(step, *ranks.reduce(wire))

    def _merge(self, step: MeasuredStep, wire: Tensor) -> Tensor | None:
        """The sums and scalars of all ranks; None, and that is said, where they are no snapshot."""
        assert self._ranks is not None
        merged = self._ranks.merge(wire, list(step.scalars))
        step.silent_ranks = merged.silent
        if not merged.same_step:
            self._warn(different_steps(step.number, merged.steps), key="different steps")
            return None
        if len(merged.silent) == len(merged.parts):
            if not self.stopped:
                self._recorded_nothing(step)
            return None
        if merged.silent and self._ranks.rank == 0:
            self._warn(silent_ranks(step.number, merged.parts), key=f"silent {merged.silent}")
        return merged.values
