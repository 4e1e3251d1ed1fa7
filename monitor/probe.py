"""A fixed probe batch: the model runs on it when a step is measured, and everything is put back exactly as it was."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from repflow.monitor.capture import Capture
from repflow.monitor.delivery import MeasuredStep
from repflow.monitor.drift import Drift
from repflow.monitor.taps import is_compiled
from repflow.monitor.wrappers import unwrap
from repflow.triton_kernels.hsic import Estimator

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
ProbeBatch = Batch | Callable[[], Batch]
"""What the model's forward is given: a mapping as keywords, a sequence as positional arguments, a tensor as the only
one; or what returns one of these, called once."""


class Probe:
    """Runs a model on one batch, always the same, without a trace in the training run.

    The batch is copied to the model's device at the first run, and kept there.

    Args:
        model: what is trained.
        batch: see `ProbeBatch`.
        estimator: of the HSIC behind `drift`.
        compiled: whether the model is compiled, or will be.

    Raises:
        TypeError: a batch that is none.
        ValueError: a model that cannot be run between training steps; see `check_can_probe`.
    """

    def __init__(self, model: Module, batch: ProbeBatch, estimator: Estimator, *, compiled: bool) -> None:
        if not callable(batch):
            _check_batch(batch)
        check_can_probe(model, compiled=compiled)
        self.drift = Drift(estimator)
        self._model, self._given = model, batch
        self._batch: Batch | None = None

    @property
    def device(self) -> torch.device:
        """Where the model takes its input: the device of its first parameter."""
        return next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))

    def measure(self, capture: Capture, step: MeasuredStep) -> None:
        """Run the batch while `capture` records, which adds it to the `step`.

        Raises:
            RuntimeError: the forward raised.
        """
        host_ms = step.host_ms
        capture.arm(None)
        try:
            with step.timed(self.device):
                self.run()
        except Exception as error:
            raise RuntimeError(f"the forward of probe_batch raised {type(error).__name__}: {error}") from error
        finally:
            capture.disarm()
            step.host_ms = host_ms  # the hooks' own time is a part of what this call takes

    def check_measured(self, capture: Capture, step: MeasuredStep) -> None:
        """Refuse a forward that was not recorded once, from the first block to the last, though no hook failed.

        Raises:
            RuntimeError: it was not.
        """
        if step.forwards != 1:
            reasons = capture.broken or ", ".join(capture.ignored) or f"it did so {step.forwards} times"
            raise RuntimeError(f"expected the forward of probe_batch to run all blocks once, but {reasons}")

    def run(self) -> None:
        """One forward in evaluation mode and without gradients; autocast is as it is where this is called.

        Raises:
            ValueError: the model has become one that cannot be run here.
            Exception: whatever the batch or the forward raises.
        """
        check_can_probe(self._model)
        with undisturbed(self._model):
            if self._batch is None:
                given = self._given() if callable(self._given) else self._given
                self._batch = _copied(_check_batch(given), self.device)
                assert self._batch is not None
            batch: Batch = self._batch
            model = _without_ddp(self._model)
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, Tensor):
                model(batch)
            else:
                model(*batch)

    def release(self) -> None:
        """Give the memory back: the batch, and the states that drift refers to."""
        self._batch = None
        self.drift.release()


def check_can_probe(model: Module, *, compiled: bool = False) -> None:
    """Refuse what a forward between training steps would harm.

    A sharded model's forward waits for all ranks: one whose monitor has failed would leave the others waiting. A
    compiled model would be compiled a second time. Parameters that are still to be made would be drawn too early.

    Raises:
        ValueError: `model` is one of these.
    """
    parameters = list(model.parameters())
    sharded = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if sharded or any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in parameters):
        found = "parameters that are sharded over ranks"
    elif compiled or is_compiled(model):
        found = "a compiled one, which would be compiled again for evaluation mode"
    elif any(map(is_lazy, parameters)):
        found = "parameters without a shape: run one forward before the monitor is made"
    else:
        return
    raise ValueError(
        f"`Monitor`: expected a model for probe_batch= that can be run between training steps, got {found}. "
        "Without probe_batch= the training batches are measured"
    )


@contextmanager
def undisturbed(model: Module) -> Iterator[None]:
    """Run forwards of `model` inside, in evaluation mode and without gradients, and leave no trace of them.

    Put back are the mode and every other attribute of each module, its buffers, and the random states of Python, NumPy,
    and PyTorch on the CPU and the model's GPUs.
    """
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    cached, python, numpy = torch.is_autocast_cache_enabled(), random.getstate(), np.random.get_state()
    # The autocast of older PyTorch hands weights that were cast without gradients to the training forward.
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.random.fork_rng(list(gpus)), torch.no_grad(), _in_evaluation(model):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _in_evaluation(model: Module) -> Iterator[None]:
    """Evaluation mode, set without `eval()`: overridden, it may do more, such as merging adapters into weights."""
    kept = [(module, vars(module).copy(), module._buffers.copy()) for module in model.modules()]
    buffers = [buffer for _, _, held in kept for buffer in held.values() if buffer is not None]
    copies = [(buffer, buffer._version, buffer.clone()) for buffer in buffers]
    try:
        for module, *_ in kept:
            module.training = False
        yield
    finally:
        for module, attributes, held in kept:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(held)
        for buffer, version, copy in copies:
            if buffer._version != version:
                buffer.copy_(copy)


def _without_ddp(model: Module) -> Module:
    """The module inside of DDP, whose own forward sends buffers to the other ranks; any other model as it is."""
    inner = unwrap(model)
    return unwrap(inner.module) if isinstance(inner, DistributedDataParallel) else model


def _check_batch(batch: Any) -> Batch:
    if isinstance(batch, str) or not isinstance(batch, Tensor | Mapping | Sequence):
        raise TypeError(
            "`Monitor`: expected probe_batch as the arguments of the model's forward (a mapping, a tuple or a tensor), "
            f"or a function that returns them, got {type(batch).__name__}"
        )
    return batch


def _copied(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it copied to `device`: what the user does to the original must not reach it."""
    match value:
        case Tensor():
            return value.detach().to(device, copy=True)
        case Mapping():
            return {name: _copied(entry, device) for name, entry in value.items()}
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(_copied(entry, device) for entry in value)
        case _:
            return value
