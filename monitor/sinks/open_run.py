"""A run file as an `xarray.Dataset`, every value divided out of the stored sums."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from repflow.monitor.sinks._reading import RunFile, read_run_file
from repflow.monitor.sinks._schema import Record, RunFileError
from repflow.monitor.snapshot import SSM_QUANTILES, RunInfo
from repflow.monitor.sum_layout import POSITION_BINS, SumLayout
from repflow.monitor.warning import warn

if TYPE_CHECKING:
    import xarray

# variable -> dims after `step`, dtype, long_name, units
_VARIABLES: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "inter_token": (("state",), "f8", "inter-token similarity, mean cosine over pairs of tokens", "1"),
    "update_inter_token": (("transition",), "f8", "inter-token similarity of the updates of a block", "1"),
    "adjacent": (("transition",), "f8", "cosine of a token's states before and after a block", "1"),
    "norms": (("state",), "f8", "L2 norm of a token's state", "units of the stream"),
    "v_loc": ((), "f8", "V_loc, mean absolute second difference over depth", "units of the stream"),
    "v_glob": ((), "f8", "V_glob, mean standard deviation over depth", "units of the stream"),
    "v_loc_rel": ((), "f8", "V_loc of a token relative to the RMS of its states", "1"),
    "v_glob_rel": ((), "f8", "V_glob of a token relative to the RMS of its states", "1"),
    "local_variance": (("state",), "f8", "V_loc at an interior state", "units of the stream"),
    "cka": (("state", "state_b"), "f8", "linear CKA of two states, tokens as examples", "1"),
    "hsic_top_token": (("state",), "f8", "largest share of one token in the sum of fourth powers behind CKA", "1"),
    "adjacent_tokens": (("transition", "position"), "f8", "`adjacent` by relative position in the sequence", "1"),
    "overhead_ms": ((), "f8", "time spent on monitoring, mean over the snapshots of a window", "ms"),
    "time": ((), "f8", "when the snapshot was written", "seconds since 1970-01-01"),
    "ssm_decay": (("transition", "quantile"), "f8", "decay of the slowest channel of a block, over tokens", "1"),
    "ssm_memory": (("transition", "quantile"), "f8", "memory length, over tokens and channels", "tokens"),
    "ssm_nonfinite": (("transition",), "i8", "valid tokens with a Δ that is not finite", "tokens"),
    "drift_first": (("state",), "f8", "linear CKA of a state with itself at the first measurement", "1"),
    "drift_previous": (("state",), "f8", "linear CKA of a state with itself at the measurement before", "1"),
    "nonfinite": (("state",), "i8", "valid tokens with a NaN or an infinity", "tokens"),
    "zero": (("state",), "i8", "valid tokens that are the zero vector", "tokens"),
    "tokens": ((), "i8", "valid tokens measured", "tokens"),
    "sequences": ((), "i8", "sequences or documents measured", "sequences"),
}

_AT_A_TIME = 32
"""Windows whose sums are laid out together."""


def open_run(path: str | os.PathLike[str], *, window: int = 1, attempt: int | None = None) -> "xarray.Dataset":
    """Open a run file, also while the run is still writing to it.

    Dims: `step` (of the optimizer), `state` and `state_b` 0 … S−1, `transition` 0 … S−2 (transition l is the work of
    block l, from state l to l + 1; coords `block_kind`, `block_name`), `position` (centres of 64 bins of relative
    position in the sequence) and, in a run with state-space blocks, `quantile` (levels from 0 to 1). Variables: the
    values of `Snapshot` under the same names, `local_variance` by state with NaN at both ends, `time` (Unix, s), and
    one for each of `Snapshot.scalars`, such as `loss`, NaN where a step has none; a scalar with the name of another
    variable or dim gets the prefix `scalar_`. Attrs say what was monitored; `alerts` is a JSON list of the alerts that
    were raised, by step, each an object with the fields of `Alert`; `warnings` says, line by line, what is missing,
    which is warned of, too.

    A run that was resumed has several attempts. By default the latest has the say: what an earlier one measured at or
    after the first step of a later one is left out, and so are attempts with another number of states than the last.

    Args:
        path: The run file.
        window: Snapshots that are merged into one, by adding up their sums before dividing (not by averaging values);
            the last window may hold fewer. `step` and `time` are those of its last snapshot, `overhead_ms` and
            scalars the mean.
        attempt: Number of the only attempt to read, from 1.

    Raises:
        FileNotFoundError: There is no such file.
        RunFileError: It is no run file, or of a newer version, or has no such attempt. A damaged file opens as
            far as it is whole, with a warning that counts what is lost.
        ValueError: `window` is not a positive integer.
    """
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"`open_run`: expected window= to be a number of snapshots of at least 1, got {window!r}")
    path = Path(path)
    file = read_run_file(path)
    number = max(file.attempts) if attempt is None else attempt
    records = _merged(file) if attempt is None else _only(path, file, attempt)
    missing = [text for text in (file.damage, _left_out(path, file) if attempt is None else "") if text]
    for text in missing:
        warn(text)
    windows = [records[start : start + window] for start in range(0, len(records), window)]
    alerts = [alert for record in records if record.alerts for alert in json.loads(record.alerts)]
    attrs = {
        "attempt": number,
        "warnings": "\n".join(missing),
        "alerts": json.dumps(alerts, ensure_ascii=False),
    }
    return _dataset(file.attempts[number], file.attempts, windows, attrs)


def _only(path: Path, file: RunFile, attempt: int) -> list[Record]:
    if attempt not in file.attempts:
        present = ", ".join(map(str, file.attempts))
        raise RunFileError(f"{path}: expected attempt= to be one of {present}, which the file holds, got {attempt!r}")
    return _of(file, attempt)


def _merged(file: RunFile) -> list[Record]:
    """The records that no later attempt supersedes, of the attempts with as many states as the last."""
    others = _of_another_depth(file)
    kept: list[Record] = []
    for number in file.attempts:
        new = [] if number in others else _of(file, number)
        if new:
            kept = [record for record in kept if record.step < new[0].step] + new
    return kept


def _of_another_depth(file: RunFile) -> list[int]:
    """Numbers of the attempts with another number of states than the last."""
    num_states = file.attempts[max(file.attempts)].num_states
    return [number for number, run in file.attempts.items() if run.num_states != num_states]


def _left_out(path: Path, file: RunFile) -> str:
    others = _of_another_depth(file)
    if not others:
        return ""
    num_states = file.attempts[max(file.attempts)].num_states
    return (
        f"{path}: attempts {', '.join(map(str, others))} are left out: the last has {num_states} states and they "
        "do not; attempt= reads one of them"
    )


def _of(file: RunFile, attempt: int) -> list[Record]:
    """The records of one attempt, by step."""
    return sorted((record for record in file.records if record.attempt == attempt), key=lambda record: record.step)


def _values(
    windows: Sequence[Sequence[Record]], attempts: Mapping[int, RunInfo], layout: SumLayout
) -> dict[str, Tensor]:
    """The values of every window. Few of their sums are there at a time, since these are most of a run file."""
    sums = torch.empty(min(len(windows), _AT_A_TIME), layout.size, dtype=torch.float64)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, max(len(windows), 1), _AT_A_TIME):
        some = windows[start : start + _AT_A_TIME]
        for row, (first, *others) in zip(sums, some, strict=False):
            # By NumPy, whose copy takes one thread: PyTorch's wait for each other where the machine is busy training.
            row.numpy()[:] = _laid_out(first.tensor(), attempts[first.attempt].layout, layout).numpy()
            for record in others:
                layout.merge_(row, _laid_out(record.tensor(), attempts[record.attempt].layout, layout))
        parts.append(layout.values(sums[: len(some)]))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _laid_out(sums: Tensor, given: SumLayout, wanted: SumLayout) -> Tensor:
    """Sums in the layout `wanted`, which has all state-space blocks that `given` has, and drift if it has."""
    if len(sums) == given.size - 2:  # of a version that did not yet have what is last, of documents
        sums = pad(sums, (0, 2))
    if given == wanted:
        return sums
    result = wanted.zeros()
    into, rows = wanted.views(result), [wanted.ssm_blocks.index(block) for block in given.ssm_blocks]
    for name, value in given.views(sums).items():
        if value.numel():  # of what `given` lacks the sums stay 0
            into[name][rows if name.startswith("ssm_") else ...] = value
    return result


def _scalars(windows: Sequence[Sequence[Record]]) -> dict[str, np.ndarray]:
    """What the training loop logged: the mean over each window, NaN where it has none."""
    scalars: dict[str, np.ndarray] = {}
    for row, window in enumerate(windows):
        logged: dict[str, list[float]] = {}
        for record in window:
            for name, value in json.loads(record.scalars).items():
                logged.setdefault(name, []).append(value)
        for name, values in logged.items():
            scalars.setdefault(name, np.full(len(windows), np.nan))[row] = np.mean(values)
    return scalars


def _dataset(
    run: RunInfo,
    attempts: Mapping[int, RunInfo],
    windows: Sequence[Sequence[Record]],
    attrs: Mapping[str, Any],
) -> "xarray.Dataset":
    import xarray  # slow to import, and writing a run does not need it

    steps = np.array([window[-1].step for window in windows], dtype=np.int64)
    # A run may have been begun without the metric `ssm` or a probe batch, or by a version without them.
    of = [run, *(attempts[record.attempt] for window in windows for record in window)]
    ssm_blocks = tuple(sorted({block for info in of for block in info.ssm_blocks}))
    layout = SumLayout(run.num_states, ssm_blocks, any(info.probe for info in of))
    coords = _coords(run, layout) | {"step": ("step", steps, {"long_name": "optimizer step", "units": "1"})}
    values = _values(windows, attempts, layout)
    # interior states only: NaN at both ends
    ends = run.num_states - values["local_variance"].shape[-1]
    values["local_variance"] = pad(values["local_variance"], (min(ends, 1), max(ends - 1, 0)), value=np.nan)
    arrays = {name: value.numpy() for name, value in values.items()}
    arrays["overhead_ms"] = np.array([np.mean([record.overhead_ms for record in window]) for window in windows])
    arrays["time"] = np.array([window[-1].written for window in windows])
    variables: dict[str, Any] = {
        name: (("step", *dims), arrays[name].astype(dtype, copy=False), {"long_name": long_name, "units": units})
        for name, (dims, dtype, long_name, units) in _VARIABLES.items()
        if (layout.ssm_blocks or not name.startswith("ssm_")) and (layout.probe or not name.startswith("drift_"))
    }
    for name, array in _scalars(windows).items():
        free = f"scalar_{name}" if name in variables or name in coords else name
        variables[free] = ("step", array, {"long_name": f"{name}, as the training loop logged it", "units": "1"})
    return xarray.Dataset(variables, coords, {**_attrs(run), **attrs})


def _coords(run: RunInfo, layout: SumLayout) -> dict[str, Any]:
    states, blocks = np.arange(run.num_states), run.blocks
    centres = (np.arange(POSITION_BINS) + 0.5) / POSITION_BINS
    levels = {"quantile": ("quantile", np.array(SSM_QUANTILES), {"long_name": "level of a quantile", "units": "1"})}
    return {
        "state": ("state", states, {"long_name": "state of the residual stream", "units": "1"}),
        "state_b": ("state_b", states, {"long_name": "the other state of a pair", "units": "1"}),
        "transition": ("transition", states[:-1], {"long_name": "from state l to l + 1, by block l", "units": "1"}),
        "position": ("position", centres, {"long_name": "relative position in the sequence", "units": "1"}),
        "block_kind": ("transition", np.array([block.kind for block in blocks], dtype=str)),
        "block_name": ("transition", np.array([block.name for block in blocks], dtype=str)),
        **(levels if layout.ssm_blocks else {}),
    }


def _attrs(run: RunInfo) -> dict[str, Any]:
    config: Mapping[str, Any] = run.config
    return {
        "name": run.name,
        "stream": run.stream,
        "model_class": run.model_class,
        "parameters": run.parameters,
        "config": json.dumps(dict(config), ensure_ascii=False),
        "versions": json.dumps(dict(run.versions), ensure_ascii=False),
        "cka_estimator": str(config.get("cka_estimator", "unknown")),
        "states": str(config.get("states", "unknown")),
        "measured": "probe batch" if run.probe else "training batches",
    }
