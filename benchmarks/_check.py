"""Whether a monitored step says what the float64 reference says of the same states."""

import torch

from repflow.monitor import Monitor, Snapshot
from repflow.monitor.accumulator import Accumulator
from repflow.monitor.captured import CapturedForward
from repflow.monitor.config import Metric
from repflow.monitor.sum_layout import SumLayout
from repflow.triton_kernels._dispatch import force

EXACT = ("tokens", "sequences", "nonfinite", "zero")
ABSOLUTE = ("inter_token", "update_inter_token", "adjacent", "adjacent_tokens")
RELATIVE = ("norms", "v_loc", "v_glob", "local_variance", "v_loc_rel", "v_glob_rel")
TOLERANCE = 1e-5
"""Of cosines, absolute; of lengths and variation, relative."""
CKA_TOLERANCE = {torch.float32: 1e-4}
"""Absolute; 2e-3 for narrower states."""


class Reference:
    """Runs the reference beside `monitor` on every forward that it captures, until `compare`."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor, self._capture = monitor, monitor._capture
        self._add = self._capture.on_forward
        self._sums: Accumulator | None = None
        self._dtype = torch.float32
        self._capture.on_forward = self._both

    def _both(self, forward: CapturedForward) -> None:
        self._add(forward)
        config, device = self._monitor.config, forward.states.device
        if self._sums is None:
            layout = SumLayout(len(forward.states))
            self._sums = Accumulator(config, layout, self._monitor._current().number, device, _raise)
            self._dtype = forward.states.dtype
        with force("reference"):
            self._sums.add(forward, config.metrics)

    def compare(self) -> dict[str, float]:
        """The error of every quantity as a share of what is allowed; infinite where one of the two alone is NaN."""
        self._capture.on_forward = self._add
        self._monitor.flush()
        got = self._monitor.latest
        if got is None or self._sums is None:
            raise RuntimeError("expected a sampled step, got none: the monitor says why in a warning")
        states = len(got.inter_token)
        want = Snapshot.from_sums(self._sums.flat.cpu(), num_states=states, step=0, stream="", overhead_ms=0)
        return shares_of_tolerance(got, want, self._dtype)


def shares_of_tolerance(got: Snapshot, want: Snapshot, dtype: torch.dtype) -> dict[str, float]:
    """The error of every quantity as a share of what is allowed for states of `dtype`; infinite where one is NaN."""
    errors = {name: 0.0 if _same(got, want, name) else torch.inf for name in EXACT}
    errors |= {name: _error(got, want, name) / TOLERANCE for name in ABSOLUTE}
    errors |= {name: _error(got, want, name, relative=True) / TOLERANCE for name in RELATIVE}
    return errors | {"cka": _error(got, want, "cka") / CKA_TOLERANCE.get(dtype, 2e-3)}


def _raise(metric: Metric, error: Exception) -> None:
    raise error


def _same(got: Snapshot, want: Snapshot, name: str) -> bool:
    return bool(torch.equal(*(torch.as_tensor(getattr(snapshot, name)) for snapshot in (got, want))))


def _error(got: Snapshot, want: Snapshot, name: str, relative: bool = False) -> float:
    one, other = getattr(got, name), getattr(want, name)
    if not torch.equal(one.isnan(), other.isnan()):
        return torch.inf
    error = (one - other).abs()
    return float((error / other.abs() if relative else error).nan_to_num(0.0, torch.inf).max())
