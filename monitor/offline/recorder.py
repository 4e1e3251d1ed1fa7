"""Forwards of a model in evaluation mode, measured with the taps, kernels and sums of the live monitor."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import Module

from repflow.monitor.accumulator import Accumulator
from repflow.monitor.buffer import CaptureBuffer
from repflow.monitor.capture import Capture
from repflow.monitor.captured import CapturedForward
from repflow.monitor.config import Metric, MonitorConfig, StatesConvention
from repflow.monitor.delivery import on_device
from repflow.monitor.offline import OfflineError
from repflow.monitor.residual_stream import ResidualStream, find_residual_stream
from repflow.monitor.sampling import Selection
from repflow.monitor.sum_layout import SumLayout
from repflow.triton_kernels.hsic import Estimator

OFFLINE_METRICS: tuple[Metric, ...] = tuple(metric for metric in get_args(Metric) if metric != "ssm")
_EVERYTHING = 2**40  # tokens, and MiB: nothing is sampled, and what does not fit runs out of memory


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is kept of the forwards of a batch."""

    sums: Tensor
    """As `SumLayout` has them, on the device of the states."""
    features: Tensor | None
    """`[S, R, D]`: the states of each sequence's last token."""


class StateRecorder:
    """Reads h^(0..L) of every forward of a model, all sequences and all tokens, and adds them up.

    A context manager: inside of it hooks are on the model. No failure is swallowed.

    Args:
        model: in evaluation mode.
        metrics: which families to compute.
        states: whether h^(L) is read before (`residual`) or after the final norm (`hf`).
        cka_estimator: of HSIC.
        skip_first_tokens: leave out the first tokens of every sequence from the statistics.
        features: keep the states of last tokens.
        on_states: called with the states `[S, R, T, D]` of each forward, which are valid until it returns.

    Raises:
        OfflineError: no stream is found in the model, an unknown choice, or `hf` for a model without a final norm.
    """

    def __init__(
        self,
        model: Module,
        *,
        metrics: tuple[Metric, ...] = OFFLINE_METRICS,
        states: StatesConvention = "residual",
        cka_estimator: Estimator = "unbiased",
        skip_first_tokens: int = 0,
        features: bool = False,
        on_states: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._model, self._keep, self._on_states = model, features, on_states
        try:
            self.stream: ResidualStream = find_residual_stream(model)
            self._config = MonitorConfig(
                every_n_steps=1,
                max_tokens=_EVERYTHING,
                cka_tokens=_EVERYTHING,
                max_memory_mib=_EVERYTHING,
                metrics=metrics,
                states=states,
                cka_estimator=cka_estimator,
                skip_first_tokens=skip_first_tokens,
            )
        except ValueError as error:
            raise OfflineError(str(error)) from error
        if states == "hf" and self.stream.final_norm is None:
            raise OfflineError(
                f'states="hf": expected a norm behind the last block of {type(model).__name__}, found none; use '
                'states="residual", which transformers returns too of a model without it'
            )
        self.layout = SumLayout(len(self.stream) + 1)
        self._spread = len({parameter.device for parameter in model.parameters()}) > 1
        self._takes = inspect.signature(model.forward).parameters
        self._sums: Accumulator | None = None
        self._features: list[Tensor] = []
        self._last: Tensor | None = None
        self._capture = Capture(
            stream=self.stream,
            final_norm=states == "hf",
            buffer=CaptureBuffer(self._config.max_memory_mib),
            choose=lambda batch, state: Selection(None, None, batch),
            on_forward=self._add,
            run=_call,
            training_only=False,
        )

    def __enter__(self) -> "StateRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Take the hooks off the model and give all memory back."""
        self._capture.disarm()
        self._capture.remove()
        self._capture.buffer.release()
        self._sums, self._features, self._last = None, [], None

    @torch.no_grad()
    def measure(
        self, ids: Int64[Tensor, "R T"], mask: Bool[Tensor, "R T"] | None = None, *, rows: int | None = None
    ) -> Measured:
        """Run a batch through the model, and measure it.

        Args:
            ids: tokens, padded on the right.
            mask: False at padding; None, there is none.
            rows: sequences of one forward; all if None.

        Raises:
            OfflineError: the model cannot be followed from its first block to its last.
        """
        self._sums, self._features = None, []
        blocks = dict.fromkeys(block.module for block in self.stream.blocks if self._spread)
        with on_device(ids.device), _on_their_devices(blocks, ids.device):
            for part, part_mask in _split(ids, mask, rows or len(ids)):
                self._forward(part, part_mask)
        assert self._sums is not None
        return Measured(sums=self._sums.flat, features=torch.cat(self._features, 1) if self._keep else None)

    def _forward(self, ids: Tensor, mask: Tensor | None) -> None:
        before = 0 if self._sums is None else self._sums.forwards
        self._last = torch.full((len(ids),), ids.shape[1], device=ids.device) if mask is None else mask.sum(1)
        options = {"attention_mask": None if mask is None else mask.long(), "use_cache": False, "return_dict": True}
        self._capture.arm(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
        self._model(input_ids=ids, **{name: value for name, value in options.items() if name in self._takes})
        if self._sums is None or self._sums.forwards == before:
            reasons = ", ".join(self._capture.ignored) or "the blocks were not called"
            raise OfflineError(
                f"{type(self._model).__name__}: expected the blocks of '{self.stream.name}' to run one after another, "
                f"but {self._capture.broken or reasons}"
            )

    def _add(self, captured: CapturedForward) -> None:
        if self._sums is None:
            self._sums = Accumulator(self._config, self.layout, 0, captured.states.device, _fail)
        self._sums.add(captured, self._config.metrics)
        if self._on_states is not None:
            self._on_states(captured.states)
        if self._keep:
            assert self._last is not None
            last = self._last.to(captured.states.device) - 1
            self._features.append(_rows_at(captured.states, last))


@contextmanager
def _on_their_devices(modules: Iterable[Module], usual: torch.device) -> Iterator[None]:
    """Make the GPU that a module lies on the current one while it runs, where that is not the usual one.

    Kernels that do not ask where their tensors are, as some of mamba_ssm, run on the current GPU. accelerate, which
    spreads a model over several, moves a module's input to it, and leaves the current one as it is.
    """
    with ExitStack() as hooks, ExitStack() as current:

        def enter(module: Module, _: object) -> None:
            current.enter_context(on_device(places[module]))

        def leave(*_: object) -> None:
            current.close()

        places = {module: _device_of(module) or usual for module in modules}
        for module, device in places.items():
            if device.type == "cuda" and device != usual:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        yield


def _device_of(module: Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


def _rows_at(states: Float[Tensor, "S R T D"], index: Int64[Tensor, " R"]) -> Float[Tensor, "S R D"]:
    """The state of each row at one token of it: a copy."""
    return states[:, torch.arange(len(index), device=states.device), index]


def _split(ids: Tensor, mask: Tensor | None, rows: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(ids), rows):
        part = slice(start, start + rows)
        yield ids[part], None if mask is None else mask[part]


def _call(call: Callable[..., None], *args: Any) -> None:
    """Hooks of the live monitor let no exception out; these do."""
    call(*args)


def _fail(metric: Metric, error: Exception) -> None:
    raise error
