"""From the device to the host without waiting: results leave when a step ends and are picked up on a later one."""

import operator
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from repflow.monitor.accumulator import Accumulator
from repflow.monitor.snapshot import Snapshot
from repflow.monitor.sum_layout import SumLayout


@runtime_checkable
class Ready(Protocol):
    """When something has arrived on the host: a `torch.cuda.Event`, or the like."""

    def query(self) -> bool:
        """Whether it has."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...


@dataclass(eq=False)
class MeasuredStep:
    """A sampled step, while it is being recorded and until its results have arrived."""

    number: int
    """The optimizer step."""
    sums: Accumulator | None = None
    """None until its first micro-batch."""
    scalars: dict[str, list[int | float | Tensor]] = field(default_factory=dict)
    """What the training loop logged: several values of a name are averaged."""
    host_ms: float = 0.0
    """Time that the monitor's own code took on the host."""
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    """Before and after each piece of the monitor's work on a GPU."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Forwards that were left out, by reason."""
    reduced: bool = False
    """Whether what arrives is the vector of `Ranks`."""
    silent_ranks: tuple[int, ...] = ()
    """Ranks that measured nothing of it."""

    @property
    def forwards(self) -> int:
        """Micro-batches that were added so far."""
        return 0 if self.sums is None else self.sums.forwards

    def log(self, name: str, value: object) -> None:
        """Keep a scalar of the training loop; several values of a name are averaged. Tensors are not waited for.

        Raises:
            TypeError: neither a number nor a tensor of one.
        """
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.detach().clone()  # the loop may go on to change it
        elif not isinstance(value, int | float):
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"left out {name!r}: expected a number or a tensor of one, got {got}")
        self.scalars.setdefault(name, []).append(value)

    def wait_for_events(self) -> None:
        """Make the current stream wait for the monitor's work: the step may have run on another one."""
        for _, end in self.events:
            torch.cuda.current_stream().wait_event(end)

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Count what runs inside on `device`, if that is a GPU."""
        if device.type != "cuda":
            yield
            return
        with on_device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
        self.events.append((start, end))

    def overhead_ms(self) -> float:
        """Time spent on the host or on the device, whichever is more: they overlap. Only after the results arrived."""
        return max(self.host_ms, sum(start.elapsed_time(end) for start, end in self.events))

    def snapshot(self, values: Float64[Tensor, " n"], layout: SumLayout, stream: str, extra_ms: float) -> Snapshot:
        """The snapshot of the step, from the `values` that arrived."""
        scalars = dict(zip(self.scalars, values[layout.size :].tolist(), strict=True))
        if self.reduced:
            scalars["silent_ranks"] = float(len(self.silent_ranks))  # for the run file
        return Snapshot.from_sums(
            values[: layout.size],
            num_states=layout.num_states,
            ssm_blocks=layout.ssm_blocks,
            probe=layout.probe,
            step=self.number,
            stream=stream,
            overhead_ms=self.overhead_ms() + extra_ms,
            scalars=scalars,
            silent_ranks=self.silent_ranks,
        )


def step_number(step: object) -> int:
    """The number of a step, from anything that is an integer.

    Raises:
        TypeError: it is none.
        ValueError: it is negative.
    """
    try:
        number = operator.index(step)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"`Monitor.step`: expected the number of the optimizer step, got {step!r}") from None
    if number < 0:
        raise ValueError(f"`Monitor.step`: expected the number of the optimizer step, 0 or more, got {number}")
    return number


class Delivery:
    """Steps whose results are on their way, in order."""

    def __init__(self) -> None:
        self._queue: deque[tuple[MeasuredStep, Tensor, Ready | None]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def send(self, step: MeasuredStep) -> None:
        """Start the copy of the sums and scalars of a step to the host."""
        assert step.sums is not None
        flat = step.sums.flat
        with on_device(flat.device):
            step.wait_for_events()
            values = torch.cat([flat, *(mean(numbers, flat.device) for numbers in step.scalars.values())])
            if values.device.type == "cuda":
                self.expect(step, *copy_to_host(values))
            else:
                self.expect(step, values.cpu(), None)

    def expect(self, step: MeasuredStep, values: Tensor, ready: Ready | None) -> None:
        """Queue what is on its way: `values` are there when `ready` says so, None for now."""
        self._queue.append((step, values, ready))

    def receive(self, *, wait: bool = False) -> Iterator[tuple[MeasuredStep, Tensor]]:
        """The steps that have arrived, each with its sums and then its scalars; with `wait`, all of them."""
        while self._queue:
            step, values, ready = self._queue[0]
            if ready is not None and not wait and not ready.query():
                return
            self._queue.popleft()
            if ready is not None:
                ready.synchronize()
            yield step, values

    def clear(self) -> None:
        """Forget what has not arrived."""
        self._queue.clear()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one if it is a GPU: events and streams are those of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def copy_to_host(values: Float64[Tensor, " n"]) -> tuple[Tensor, Ready]:
    """Start the copy of a tensor of the current GPU to pinned memory, on the current stream."""
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready


def mean(numbers: list[int | float | Tensor], device: torch.device) -> Float64[Tensor, " 1"]:
    """Mean of numbers and tensors of one element, on `device`, without waiting for it."""
    values = [
        x.to(device, torch.float64, non_blocking=True).reshape(1)
        if isinstance(x, Tensor)
        else torch.full((1,), float(x), dtype=torch.float64, device=device)  # written there: nothing is copied
        for x in numbers
    ]
    return values[0] if len(values) == 1 else torch.cat(values).mean(0, keepdim=True)
