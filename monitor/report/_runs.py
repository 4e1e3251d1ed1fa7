"""The runs of a report: opened, named apart, and given a colour."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from repflow.monitor.sinks.open_run import RunFileError, open_run

RUN_COLORS = ("#1f83c4", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8f6fc0")
"""Colours of runs in order (Okabe and Ito's, which colour-blind readers tell apart, with a blue that also stands out on
dark ground, and a violet)."""
RUN_DASHES = ("solid", "dash", "dot", "dashdot")
"""Line styles: the next one is taken each time the colours are used up."""

BASELINE_COLOR = "#8a8f94"
"""Of all baselines, which stand beside the runs."""

_OVER_STEPS = ("v_loc", "v_glob", "v_loc_rel", "v_glob_rel", "overhead_ms", "time", "tokens", "sequences")


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run as the report shows it. S states, S−1 blocks, n snapshots."""

    label: str
    """Name of the run, unlike that of every other run of the page."""
    index: int
    """Place among the runs; decides colour and line style."""
    data: xr.Dataset
    """What `open_run` returned."""
    baseline: bool = False
    """Whether the run is shown by its first snapshot alone, beside the others."""

    @property
    def warnings(self) -> list[str]:
        """What `open_run` warned of: a damaged file is read as far as it is whole."""
        return self.data.attrs["warnings"].splitlines()

    @property
    def color(self) -> str:
        """Colour of the run's curves."""
        return BASELINE_COLOR if self.baseline else RUN_COLORS[self.index % len(RUN_COLORS)]

    @property
    def dash(self) -> str:
        """Line style of the run's curves where they share a figure with others."""
        return RUN_DASHES[self.index // len(RUN_COLORS) % len(RUN_DASHES)]

    @property
    def depth(self) -> int:
        """Number of blocks, L = S − 1."""
        return self.data.sizes["state"] - 1

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """The measured optimizer steps, ascending, [n]."""
        return self.data["step"].values.astype(np.int64)

    @property
    def untrained(self) -> bool:
        """Whether the first snapshot is of step 0, before the first update."""
        return bool(len(self.steps)) and int(self.steps[0]) == 0

    @cached_property
    def kinds(self) -> list[str]:
        """Kind of every block, in order."""
        return [str(kind) for kind in self.data["block_kind"].values]

    @cached_property
    def block_names(self) -> list[str]:
        """Dotted name of every block, in order."""
        return [str(name) for name in self.data["block_name"].values]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The fields of the run's `MonitorConfig`."""
        return json.loads(self.data.attrs["config"])

    @property
    def scalars(self) -> list[str]:
        """Names of what the training loop logged with the snapshots, `loss` first."""
        names = [
            str(name)
            for name, variable in self.data.data_vars.items()
            if variable.dims == ("step",) and name not in _OVER_STEPS
        ]
        return sorted(names, key=lambda name: ("loss" not in name.lower(), name.lower() != "loss", name))

    def values(self, name: str) -> NDArray[np.float64]:
        """A variable as float64, steps first."""
        return self.data[name].values.astype(np.float64, copy=False)


def load_runs(files: Sequence[Path], baselines: Sequence[Path] = ()) -> list[Run]:
    """Open every run file; the baselines are the last ones.

    Raises:
        ValueError: No paths.
        RunFileError: Some that `open_run` cannot read. All of these are named with their reasons, so that no readable
            run is left out without a word.
    """
    if not files:
        raise ValueError("`write_report`: expected at least one run file, got none; pass the paths of `*.db` run files")
    opened: list[xr.Dataset] = []
    failures: list[str] = []
    paths = [*files, *baselines]
    for file in paths:
        try:
            opened.append(open_run(file))
        except (RunFileError, OSError) as error:  # each names its file
            failures.append(str(error))
    if len(paths) == 1 and failures:
        raise RunFileError(failures[0])
    if failures:
        remedy = f"leave them out: the other {len(opened)} can be read" if opened else "pass run files of repflow"
        raise RunFileError(
            f"`write_report`: {len(failures)} of {len(paths)} paths cannot be opened as run files; {remedy}\n"
            + "\n".join(f"  {failure}" for failure in failures)
        )
    return named_apart(dict(enumerate(opened)), paths, first_baseline=len(files))


def named_apart(opened: Mapping[int, xr.Dataset], files: Sequence[Path], *, first_baseline: int) -> list[Run]:
    """Runs of the files that could be opened, by their places among all `files`, which fix their colours."""
    names = [str(data.attrs["name"]) for data in opened.values()]
    labels = distinct_labels(names, [files[place] for place in opened])
    return [
        Run(label=label, index=place % first_baseline, data=data, baseline=place >= first_baseline)
        for label, (place, data) in zip(labels, opened.items(), strict=True)
    ]


def distinct_labels(names: Sequence[str], files: Sequence[Path]) -> list[str]:
    """`names`, and after those that occur twice the end of the file's path that tells them apart, or a number."""
    shared = {name for name, count in Counter(names).items() if count > 1}
    labels = list(names)
    for name in shared:
        places = [place for place, other in enumerate(names) if other == name]
        tails = _distinct_tails([files[place].resolve() for place in places])
        for place, tail in zip(places, tails, strict=True):
            labels[place] = f"{name} ({tail})"
    taken = Counter(labels)
    seen: Counter[str] = Counter()
    for place, label in enumerate(labels):
        seen[label] += 1
        if taken[label] > 1:
            labels[place] = f"{label} #{seen[label]}"
    return labels


def _distinct_tails(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ, or the file names if the same file is there twice."""
    for parts in range(1, max(len(file.parts) for file in files)):
        tails = ["/".join(file.parts[-parts:]) for file in files]
        if len(set(tails)) == len(files):
            return tails
    return [file.name for file in files]
