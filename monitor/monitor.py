"""`Monitor`: joins stream, capture, statistics and sinks, and keeps their troubles away from the training run."""

import functools
import importlib.metadata
import operator
import platform
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import UninitializedParameter

import repflow
from repflow.monitor.accumulator import Accumulator
from repflow.monitor.capture import Capture, CaptureBuffer, CapturedForward
from repflow.monitor.config import Metric, MonitorConfig
from repflow.monitor.residual_stream import ResidualStream, find_residual_stream
from repflow.monitor.sampling import Schedule, Selection, select
from repflow.monitor.sinks import AbstractSink, FanOutSink
from repflow.monitor.snapshot import BlockInfo, RunInfo, Snapshot, SumLayout


class RepflowWarning(RuntimeWarning):
    """Something could not be measured. Training is not affected."""


@dataclass(eq=False)
class _Step:
    """A sampled step while it is being recorded."""

    number: int
    sums: Accumulator | None = None
    scalars: dict[str, list[int | float | Tensor]] = field(default_factory=dict)
    host_ms: float = 0.0
    ignored: Counter[str] = field(default_factory=Counter)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)


@dataclass(eq=False)
class _InFlight:
    """The results of a step on their way from the device."""

    step: _Step
    values: Tensor
    """Sums and then scalars, on the host once `ready` has happened."""
    ready: torch.cuda.Event | None

    def arrived(self) -> bool:
        """Whether `values` can be read without waiting."""
        return self.ready is None or self.ready.query()


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

    Between sampled steps nothing of it is on the model. Whatever fails while measuring is warned about once and
    switched off; training goes on, bit for bit as without the monitor.

    Args:
        model: what is trained; it may be wrapped.
        config: what to measure; the defaults of `MonitorConfig` if None.
        sinks: where the snapshots go, besides `latest`.
        blocks: see `find_residual_stream`.
        stream: see `find_residual_stream`.
        name: of the run; the model's class and the time if None.

    Raises:
        ValueError: no residual stream was found, or `states="hf"` for a model without a final norm.
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
    ) -> None:
        self.config = config or MonitorConfig()
        self.stream: ResidualStream = find_residual_stream(model, blocks, stream=stream)
        if self.config.states == "hf" and self.stream.final_norm is None:
            raise ValueError(
                f'`Monitor`: states="hf" needs the norm behind the last block, and none was found beside '
                f'{self.stream.name!r} in {type(model).__name__}; use states="residual"'
            )
        self.run: RunInfo = _describe(model, self.stream, self.config, name)
        self.latest: Snapshot | None = None
        """The last snapshot that arrived."""
        self._schedule = Schedule(self.config.every_n_steps)
        self._metrics: tuple[Metric, ...] = self.config.metrics
        self._sink = FanOutSink(sinks)
        self._started = False
        self._enabled = True
        self._warned: set[str] = set()
        self._step: _Step | None = None
        self._in_flight: deque[_InFlight] = deque()
        self._late_ms = 0.0  # spent between sampled steps: counted with the next one
        self._capture = Capture(
            stream=self.stream,
            final_norm=self.config.states == "hf",
            buffer=CaptureBuffer(self.config.max_memory_mib),
            choose=self._choose,
            on_forward=self._add,
            guard=self._guard,
        )

    @property
    def enabled(self) -> bool:
        """False after a failure that ended monitoring, and after `close`."""
        return self._enabled

    @contextmanager
    def step(self, step: int, *, mask: Tensor | None = None) -> Iterator[None]:
        """Covers one optimizer step: its forwards, and its backwards if activations are checkpointed.

        Each forward of the model inside that has gradients enabled and the model in training mode is one micro-batch.
        Entering again with the same number adds to the step. It is published when a block with another number opens, by
        `publish`, or by `flush`. A body that raises publishes nothing.

        Args:
            step: number of the optimizer step, from 0.
            mask: `[B, T]`, attention mask or document numbers, in place of the one that the model receives.

        Raises:
            TypeError: a step that is not an integer.
            ValueError: a negative step.
        """
        if operator.index(step) < 0:
            raise ValueError(f"`Monitor.step`: expected the number of the optimizer step, 0 or more, got {step}")
        if self._step is not None and self._step.number != step:
            self.publish()
        if self._in_flight:
            self._guard(self._collect)()
        if not (self._enabled and self._schedule(step)):
            yield
            return
        self._step = self._step or _Step(step)
        self._guard(self._capture.arm)(mask)
        try:
            yield
        except BaseException:
            self._step = None
            raise
        finally:
            self._guard(self._disarm)()

    def log(self, **scalars: int | float | Tensor) -> None:
        """Keep scalars of the training loop, such as the loss, with the current step; several values are averaged.

        Does nothing on a step that is not sampled. Tensors are not waited for.
        """
        if self._step is not None:
            for name, value in scalars.items():
                self._step.scalars.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def publish(self) -> None:
        """End the current step: its results leave the device, and what has arrived goes to the sinks.

        Waits for nothing.
        """
        self._guard(self._send)()
        self._guard(self._collect)()

    def flush(self) -> None:
        """End the current step, and wait until everything has reached the sinks."""
        self._guard(self._send)()
        self._guard(functools.partial(self._collect, wait=True))()
        self._guard(self._sink.flush)()

    def close(self) -> None:
        """`flush`, close the sinks and give the memory back. May be called more than once."""
        self.flush()
        self._guard(self._capture.disarm)()
        self._capture.buffer.release()
        self._enabled = False
        self._guard(self._sink.close)()

    def discard(self) -> None:
        """Drop the step being recorded, as when its body raises."""
        self._step = None
        self._guard(self._capture.disarm)()

    def _choose(self, batch: tuple[int, int], state: Tensor) -> Selection:
        """Which part of a micro-batch to keep, within the budgets of tokens and memory."""
        capacity = self._capture.buffer.capacity(state, len(self.stream) + 1)
        wanted = min(self.config.max_tokens, batch[0] * batch[1])
        if capacity < min(4, wanted):
            raise MemoryError(
                f"expected max_memory_mib to hold {len(self.stream) + 1} states of at least 4 tokens, got "
                f"{self.config.max_memory_mib} MiB for {state.shape[-1]} features; raise max_memory_mib"
            )
        if capacity < wanted:
            limit = self.config.max_memory_mib
            self._warn(f"measures {capacity} tokens of a micro-batch instead of {wanted}: max_memory_mib={limit}")
        step = self._current()
        forward = step.sums.forwards if step.sums is not None else 0
        return select(batch, min(wanted, capacity), seed=self.config.seed, step=step.number, forward=forward)

    def _add(self, forward: CapturedForward) -> None:
        """Accumulate one micro-batch."""
        step, device = self._current(), forward.states.device
        if step.sums is None:
            step.sums = Accumulator(self.config, len(self.stream) + 1, step.number, device, self._drop_metric)
        if device.type != "cuda":
            step.sums.add(forward, self._metrics)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step.sums.add(forward, self._metrics)
        end.record()
        step.events.append((start, end))

    def _current(self) -> _Step:
        if self._step is None:
            raise RuntimeError("a hook ran outside of a monitored step")
        return self._step

    def _disarm(self) -> None:
        self._capture.disarm()
        if self._step is not None:
            self._step.ignored.update(self._capture.ignored)

    def _send(self) -> None:
        """Start the copy of a step's results to the host."""
        step, self._step = self._step, None
        if step is None or not self._enabled:
            return
        if step.sums is None:
            seen = ", ".join(f"{number} {what}" for what, number in step.ignored.items()) or "no forward at all"
            self._warn(
                f"recorded nothing on step {step.number}: expected a training-mode forward with gradients through "
                f"'{self.stream.blocks[0].name}', saw {seen}. If the model is compiled, monitor it uncompiled; "
                "if other blocks run, pass blocks=[...]",
                key="recorded nothing",
            )
            return
        scalars = [_mean(values, step.sums.flat.device) for values in step.scalars.values()]
        values = torch.cat([step.sums.flat, *scalars])
        if values.device.type == "cpu":
            self._in_flight.append(_InFlight(step, values, None))
        elif values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            self._in_flight.append(_InFlight(step, host, ready))
        else:
            self._in_flight.append(_InFlight(step, values.cpu(), None))

    def _collect(self, *, wait: bool = False) -> None:
        """Turn what has arrived into snapshots, in order, and hand them to the sinks."""
        while self._in_flight and (wait or self._in_flight[0].arrived()):
            arrived = self._in_flight.popleft()
            if arrived.ready is not None:
                arrived.ready.synchronize()
            snapshot = self._snapshot(arrived)
            if snapshot is None:
                continue
            self.latest = snapshot
            if not self._started:
                self._started = True
                self._sink.start(self.run)
            self._sink.write(snapshot)

    def _snapshot(self, arrived: _InFlight) -> Snapshot | None:
        step, layout = arrived.step, SumLayout(len(self.stream) + 1)
        sums, scalars = arrived.values[: layout.size], arrived.values[layout.size :]
        largest = int(layout.views(sums)["mask_max"])
        if largest > 1:
            self._warn(
                f"left out step {step.number}: its mask holds document numbers up to {largest}, which a GPU run "
                "cannot tell from padding without waiting; pass a boolean mask: monitor.step(k, mask=mask != 0)",
                key="documents",
            )
            return None
        device_ms = sum(start.elapsed_time(end) for start, end in step.events)
        snapshot = Snapshot.from_sums(
            sums,
            num_states=layout.num_states,
            step=step.number,
            stream=self.stream.name,
            overhead_ms=step.host_ms + device_ms + self._late_ms,
            scalars=dict(zip(step.scalars, scalars.tolist(), strict=True)),
        )
        self._late_ms = 0.0
        if snapshot.sequences == int(layout.views(sums)["short_sequences"]):
            self._warn(
                f"expected sequences of at least 2 valid tokens, but none of {snapshot.sequences} on step {step.number} is "
                "that long: similarity and CKA are NaN; look at the batch, its mask and skip_first_tokens",
                key="short",
            )
        return snapshot

    def _guard(self, call: Callable[..., None]) -> Callable[..., None]:
        """`call`, timed, and with every exception turned into a warning and the end of monitoring."""

        @functools.wraps(call, updated=())
        def guarded(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            try:
                call(*args, **kwargs)
            except Exception as error:
                self._stop(error)
            finally:
                elapsed_ms = (time.perf_counter() - began) * 1e3
                if self._step is not None:
                    self._step.host_ms += elapsed_ms
                else:
                    self._late_ms += elapsed_ms

        return guarded

    def _stop(self, error: Exception) -> None:
        """End monitoring after a failure, and free what it holds."""
        number = f" at step {self._step.number}" if self._step is not None else ""
        self._enabled = False
        self._step = None
        self._in_flight.clear()
        self._capture.disarm()
        self._capture.buffer.release()
        self._warn(
            f"stopped monitoring{number}: {type(error).__name__}: {error}. Training goes on without it", key="stopped"
        )

    def _drop_metric(self, metric: Metric, error: Exception) -> None:
        """Go on without a metric that failed."""
        self._metrics = tuple(other for other in self._metrics if other != metric)
        self._warn(f"stopped measuring {metric!r}: {type(error).__name__}: {error}. The other metrics go on")

    def _warn(self, message: str, key: str | None = None) -> None:
        """Warn once per `key`.

        A warning that the user's filters turn into an exception must not reach the training loop.
        """
        if (key or message) in self._warned:
            return
        self._warned.add(key or message)
        try:
            warnings.warn(f"repflow {message}", RepflowWarning, stacklevel=2)
        except RepflowWarning as warning:
            print(f"{type(warning).__name__}: {warning}", file=sys.stderr)


def _mean(values: list[int | float | Tensor], device: torch.device) -> Tensor:
    """Mean of numbers and 0-d tensors as a vector of one, on `device`, without waiting for it."""
    tensors = [
        torch.as_tensor(value, dtype=torch.float64).to(device, non_blocking=True).reshape(()) for value in values
    ]
    return torch.stack(tensors).mean().reshape(1)


def _describe(model: Module, stream: ResidualStream, config: MonitorConfig, name: str | None) -> RunInfo:
    model_class = type(model).__name__
    packages = ("torch", "transformers", "lightning", "pytorch_lightning", "wandb")
    loaded = {package: importlib.metadata.version(package) for package in packages if package in sys.modules}
    return RunInfo(
        name=name or f"{model_class}-{datetime.now():%Y%m%d-%H%M%S}",
        stream=stream.name,
        blocks=tuple(BlockInfo(index=block.index, name=block.name, kind=block.kind) for block in stream.blocks),
        model_class=model_class,
        parameters=sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter)),
        config=config.to_dict(),
        versions={"repflow": repflow.__version__, "python": platform.python_version(), **loaded},
    )
