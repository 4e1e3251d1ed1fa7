"""`Monitor`: joins stream, capture, statistics and sinks, and keeps their troubles away from the training run."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from repflow.monitor.accumulator import Accumulator
from repflow.monitor.buffer import CaptureBuffer
from repflow.monitor.capture import Capture, GivenMask
from repflow.monitor.captured import CapturedForward
from repflow.monitor.config import Metric, MonitorConfig
from repflow.monitor.delivery import MeasuredStep, step_number
from repflow.monitor.notices import broken_chain, goes_back, never_entered, unread_mask
from repflow.monitor.probe import Probe, ProbeBatch
from repflow.monitor.publication import Publication
from repflow.monitor.ranks import is_first_rank
from repflow.monitor.residual_stream import ResidualStream, find_residual_stream
from repflow.monitor.run_info import describe_run
from repflow.monitor.sampling import Schedule, Selection
from repflow.monitor.sequence_shards import find_sequence_group
from repflow.monitor.signatures import SignatureBook
from repflow.monitor.sinks import AbstractSink, FanOutSink
from repflow.monitor.snapshot import RunInfo, Snapshot
from repflow.monitor.ssm import DecayTaps
from repflow.monitor.taps import is_compiled, outside_modes
from repflow.monitor.token_choice import TokenChoice
from repflow.monitor.warning import WarnOnce
from repflow.monitor.weakly import weakly


class Monitor:
    """Measures the representations of `model` on sampled optimizer steps.

    ```python
    monitor = Monitor(model, MonitorConfig(every_n_steps=50), sinks=[RunFileSink()])
    for k, batch in enumerate(loader):
        with monitor.step(k):
            loss = model(**batch).loss
            loss.backward()
        monitor.log(loss=loss)
        optimizer.step(); optimizer.zero_grad()
    monitor.close()
    ```

    Between sampled steps nothing of it is on the model, unless the model is compiled: then taps are in its graph until
    `close`, which do nothing on those steps (see `MonitorConfig.compiled`). Whatever fails while measuring is warned
    about once and switched off; training goes on, bit for bit as without the monitor. A compiled model may round
    differently where the compiler fuses other operations around the taps.

    Under torch.distributed every rank has a Monitor, and the sums of a step are added up over ranks when it is
    published, without waiting: call `step`, `publish`, `flush` and `close` on all ranks alike. After `flush` or `wait`
    the same snapshot is `latest` on every rank, so that all decide alike. A rank whose monitor fails, or that records
    nothing, brings zeros and is named in `Snapshot.silent_ranks`. Uneven inputs (`Join`) need `reduce=False`.
    Where each rank holds a slice of every sequence (context or sequence parallelism), name those ranks by
    `sequence_group`: similarity between tokens and `sequences` are then those of whole sequences, exact like what is a
    sum over tokens (norms, `adjacent`, V_loc, V_glob, `tokens`). CKA takes HSIC within slices: it compares states by
    the tokens of one slice, as examples, and is no estimate of that of whole sequences. The positions of
    `adjacent_tokens` are those in slices. Without `sequence_group` a slice counts as a sequence. States may be DTensors
    that are replicated or sharded by sequences; of others each rank has but a part, and nothing is measured.

    Args:
        model: what is trained; it may be wrapped.
        config: what to measure; the defaults of `MonitorConfig` if None.
        sinks: where the snapshots go, besides `latest`. Under torch.distributed those of rank 0 alone are used.
        blocks: see `find_residual_stream`.
        stream: see `find_residual_stream`.
        name: of the run; the model's class and the time if None.
        process_group: the ranks that share a batch; the default group if None. Of ranks that see the same tokens, as
            under tensor parallelism, each would count them: pass the data-parallel group then, or `reduce=False`.
        sequence_group: the ranks that hold slices `[B, T/n, D]` of the same sequences, such as
            `mesh["cp"].get_group()`; they lie within `process_group`. For them a step costs one more collective, of
            64·(2S−1)·D·4 bytes, on the CPU waited for: there is room for 64 sequences in a step, and more are left out
            of similarity, which is said. So is a sequence of which a rank brings no slice, or another choice of tokens,
            as slices of unequal length above `max_tokens` make it. None: sequences are whole.
        probe_batch: measure this batch every time instead of what the model is trained on: curves over steps then show
            the model and not the data, and snapshots have `drift_first` and `drift_previous`. The arguments of the
            model's forward (a mapping, a tuple, or a tensor), or a function that returns them, called once. When a
            measured step opens, the model runs on it in evaluation mode and without gradients, under the autocast that
            is active there; everything is put back after, and hooks of your own fire. Always the same tokens are
            measured. If the forward raises, monitoring ends. In a resumed run drift begins again at its first step:
            the states that it refers to are in no checkpoint. Not for sharded or compiled models.

    Raises:
        TypeError: a `probe_batch` that holds no arguments.
        ValueError: no residual stream was found, `states="hf"` for a model without a final norm, `probe_batch` for a
            model that cannot be run between training steps, or a `sequence_group` that is not within `process_group`,
            for a model whose width cannot be told, or beside `probe_batch`, `skip_first_tokens` or `reduce=False`.
    """

    def __init__(
        self,
        model: Module,
        config: MonitorConfig | None = None,
        *,
        sinks: Sequence[AbstractSink] = (),
        blocks: str | Sequence[Module] | None = None,
        stream: str | None = None,
        name: str | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        sequence_group: "torch.distributed.ProcessGroup | None" = None,
        probe_batch: ProbeBatch | None = None,
    ) -> None:
        self.config = MonitorConfig.from_options(config, {})
        self.stream: ResidualStream = find_residual_stream(model, blocks, stream=stream)
        if self.config.states == "hf" and self.stream.final_norm is None:
            raise ValueError(
                f'`Monitor`: states="hf" needs the norm behind the last block, and none was found beside '
                f'{self.stream.name!r} in {type(model).__name__}; use states="residual", which '
                "transformers returns too of a model without it"
            )
        sequences = find_sequence_group(
            sequence_group, process_group, self.stream, self.config, probe=probe_batch is not None
        )
        resident = is_compiled(model) if self.config.compiled == "auto" else self.config.compiled
        self._probe: Probe | None = None
        if probe_batch is not None:
            self._probe = Probe(model, probe_batch, self.config.cka_estimator, compiled=resident)
        self.run: RunInfo = describe_run(model, self.stream, self.config, name, probe=self._probe is not None)
        self._schedule = Schedule(self.config.every_n_steps)
        self._metrics: tuple[Metric, ...] = self.config.metrics
        self._sink = FanOutSink(sinks if is_first_rank() else ())
        self._warn = WarnOnce()
        self._step: MeasuredStep | None = None
        self._is_open = False
        self._cut_off = False  # by an exception: whether the other ranks go on is unknown
        self._latest_number = 0
        self._called: int | None = None  # the step that `step` was called for, until it is entered
        self._signatures = SignatureBook(self.config.rules)
        self._publication = Publication(
            self.run,
            self.stream,
            self.config,
            self._sink,
            self._signatures,
            group=process_group,
            sequences=sequences,
            resident=resident,
            warn=self._warn,
            failed=weakly(self._stop),
        )
        self._attach(resident=resident, sliced=sequences is not None)

    @property
    def enabled(self) -> bool:
        """False after a failure that ended monitoring on this rank, and after `close`."""
        return not self._publication.stopped

    @property
    def latest(self) -> Snapshot | None:
        """The last snapshot that arrived."""
        return self._publication.latest

    def step(self, step: int, *, mask: GivenMask | None = None) -> AbstractContextManager[None]:
        """Covers one optimizer step: its forwards, and its backwards if activations are checkpointed.

        Each forward of the model inside that has gradients enabled and the model in training mode is one micro-batch.
        Entering again with the same number adds to the step. It is published when a block with another number opens, by
        `publish`, or by `flush`. A body that raises publishes nothing.

        Args:
            step: number of the optimizer step, from 0.
            mask: `[B, T]`, attention mask or document numbers, in place of the one that the model receives; or a
                function that gives it, called for each forward that is measured. A step entered again inside of itself
                with a mask has that for the forwards in there. That of a probe batch is in the batch.

        Raises:
            TypeError: a step that is not an integer.
            ValueError: a negative step.
        """
        if self._called is not None:
            self._warn(never_entered(self._called), key="never entered")
        self._called = step_number(step)
        return self._entered(self._called, mask)

    @contextmanager
    def _entered(self, step: int, mask: GivenMask | None) -> Iterator[None]:
        self._called = None
        if self._is_open:
            if self._step is not None and self._step.number != step:
                self._warn(f"left out step {step}, which began inside of step {self._step.number}", key="nested")
                mask = None
            with nullcontext() if mask is None else self._capture.masked(mask):
                yield
            return
        self._cut_off = False
        if self._step is not None and self._step.number != step:
            self.publish()
        if self._publication.in_flight:
            self._run(self._collect)
        if not (self._schedule(step) and (self.enabled or self._publication.meets_others)):
            yield
            return
        if step < self._latest_number:
            self._warn(goes_back(step, self._latest_number), key="goes back")
        self._latest_number = step
        self._step = self._step or MeasuredStep(step)
        self._is_open = True
        try:
            if self._probe is None:
                self._run(self._arm, mask)
            else:
                self._run(self._measure, self._probe)
            yield
        except BaseException:
            self._drop()
            raise
        finally:
            self._is_open = False
            self._run(self._disarm)

    @property
    def recording(self) -> bool:
        """Whether the current step is a sampled one."""
        return self._step is not None

    def log(self, **scalars: int | float | Tensor) -> None:
        """Keep scalars of the training loop, such as the loss, with the current step; several values are averaged.

        Does nothing on a step that is not sampled. Tensors are not waited for. What is no number is left out, and said.
        """
        if self._step is None:
            return
        for name, value in scalars.items():
            try:
                self._step.log(name, value)
            except TypeError as error:
                self._warn(str(error), key=f"log {name}")

    def publish(self) -> None:
        """End the current step: its results leave the device, and what has arrived goes to the sinks.

        Waits for nothing. Inside of `with monitor.step(k)` the step goes on.
        """
        self._run(self._send)
        self._run(self._collect)

    def flush(self) -> None:
        """End the current step, and wait until everything has reached the sinks.

        Inside of `with monitor.step(k)` the step goes on, and only earlier ones are waited for.
        """
        self._run(self._send)
        self.wait()

    def wait(self) -> None:
        """Wait until every step that was published has reached the sinks; the current step goes on."""
        self._run(self._collect, wait=True)
        self._run(self._sink.flush)

    def close(self) -> None:
        """`flush`, close the sinks and give the memory back. May be called more than once.

        After an exception in a step, only what has arrived from the other ranks is delivered: they may be gone.
        """
        if self._cut_off and self._publication.meets_others:
            self._step = None
            self._run(self._collect)
            self._publication.forget()
        if self._called is not None:
            self._warn(never_entered(self._called), key="never entered")
        self.flush()
        self._publication.leave()
        self._run(self._capture.disarm)
        self._run(self._capture.remove)
        self._release()
        self._publication.stopped = True
        self._run(self._sink.close)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should keep, in plain values: with it, a resumed run does not raise its alerts again."""
        return {"signatures": self._signatures.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, before the first step; keys that are missing or unknown are passed over."""
        self._run(self._signatures.load_state_dict, state_dict.get("signatures", {}))

    def discard(self) -> None:
        """Drop the step being recorded, as when its body raises."""
        self._is_open = False
        self._drop()
        self._run(self._disarm)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of what holds a monitor, such as an EMA of a model that has it as an attribute, has None there."""
        return type(None), ()

    def _attach(self, *, resident: bool, sliced: bool) -> None:
        """Make what reads the model: nothing of it is there before `_arm`, unless it is resident."""
        self._decays = DecayTaps(
            self.stream,
            skip_first=self.config.skip_first_tokens,
            failed=functools.partial(weakly(self._drop_metric), "ssm"),
            choose=weakly(self._choose_for_decays),
        )
        buffer = CaptureBuffer(self.config.max_memory_mib)
        self._tokens = TokenChoice(
            self.config, self.run.num_states, buffer, fixed=self._probe is not None, warn=self._warn
        )
        self._capture = Capture(
            stream=self.stream,
            final_norm=self.config.states == "hf",
            buffer=buffer,
            choose=weakly(self._choose),
            on_forward=weakly(self._add),
            run=weakly(self._run),
            resident=resident,
            training_only=self._probe is None,
            sliced=sliced,
            inner=self._decays.hooks() if "ssm" in self._metrics else (),
        )

    def _current(self) -> MeasuredStep:
        if self._step is None:
            raise RuntimeError("a hook ran outside of a monitored step")
        return self._step

    def _arm(self, mask: GivenMask | None) -> None:
        self._publication.join()
        if self.enabled:
            self._capture.arm(mask)

    def _measure(self, probe: Probe) -> None:
        """Run the probe batch through the model, once per step and before anything is trained on in it."""
        self._publication.join()
        step = self._current()
        if not self.enabled or step.sums is not None:
            return
        probe.measure(self._capture, step)
        if self.enabled:  # otherwise a hook has failed, and that was said
            probe.check_measured(self._capture, step)

    def _choose(self, batch: tuple[int, int], state: Tensor) -> Selection:
        return self._tokens.of_forward(self._current(), batch, state)

    def _choose_for_decays(self, captured: tuple[int, int]) -> Selection:
        return self._tokens.of_decays(self._current(), captured)

    def _add(self, forward: CapturedForward) -> None:
        """Accumulate one micro-batch."""
        step, device = self._current(), forward.states.device
        if step.sums is None:
            failed = weakly(self._drop_metric)
            packed = self._publication.packed is not False
            drift = None if self._probe is None else self._probe.drift
            drawn_by, sequences = self._tokens.drawn_by(step), self._publication.sequences
            step.sums = Accumulator(self.config, self.run.layout, drawn_by, device, failed, packed, drift, sequences)
        # The forward of a probe batch is timed as a whole.
        with step.timed(device) if self._probe is None else nullcontext():
            step.sums.add(forward, self._metrics, step.ignored.total() + self._capture.ignored.total())
            if (decays := self._decays.take(forward)) is not None:
                step.sums.add_decays(decays)

    def _disarm(self) -> None:
        self._capture.disarm()
        self._decays.forget()
        if self._step is not None:
            self._step.ignored.update(self._capture.ignored)
            if unread := self._capture.unread:
                self._warn(unread_mask(unread, probe=self._probe is not None), key="unread mask")
            if broken := self._capture.broken:
                self._warn(broken_chain(self._step, broken), key="recorded nothing")

    def _drop(self) -> None:
        """Forget what the current step has recorded. The other ranks, if any, are still met when it is published."""
        self._cut_off = True
        if self._step is not None:
            self._step = MeasuredStep(self._step.number) if self._publication.meets_others else None

    def _send(self) -> None:
        """End the step: its results leave the device."""
        if self._is_open:
            return
        step, self._step = self._step, None
        if step is not None:
            self._publication.send(step)

    def _collect(self, *, wait: bool = False) -> None:
        self._publication.collect(self._metrics, wait=wait)

    def _run(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """`call`, timed, unseen, and with every exception turned into a warning and the end of monitoring."""
        began = time.perf_counter()
        try:
            with outside_modes():
                call(*args, **kwargs)
        except Exception as error:
            self._stop(error)
        finally:
            elapsed_ms = (time.perf_counter() - began) * 1e3
            if self._step is not None:
                self._step.host_ms += elapsed_ms
            else:
                self._publication.late_ms += elapsed_ms

    def _stop(self, error: Exception) -> None:
        """End monitoring after a failure, and free what it holds."""
        number = f" at step {self._step.number}" if self._step is not None else ""
        self._publication.stop(error)
        if not self._publication.meets_others:
            self._step = None
        elif self._step is not None:
            self._step = MeasuredStep(self._step.number, scalars=self._step.scalars)
        self._capture.disarm()
        self._release()
        self._warn(
            f"stopped monitoring{number}: {type(error).__name__}: {error}. Training goes on without it", key="stopped"
        )

    def _release(self) -> None:
        self._decays.forget()
        self._capture.buffer.release()
        if self._probe is not None:
            self._probe.release()

    def _drop_metric(self, metric: Metric, error: Exception) -> None:
        """Go on without a metric that failed."""
        self._metrics = tuple(other for other in self._metrics if other != metric)
        self._warn(f"stopped measuring {metric!r}: {type(error).__name__}: {error}. The other metrics go on")
