"""The page's words and tables about the runs: what they are, how they changed, how healthy they are."""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

import numpy as np
from numpy.typing import NDArray

from repflow.monitor.report._axes import Floats
from repflow.monitor.report._html import number, run_name, table
from repflow.monitor.report._kinds import kind_pattern
from repflow.monitor.report._runs import Run

_STATES = {
    "residual": "residual stream, before the final norm",
    "hf": "as `output_hidden_states` of transformers: the last one after the final norm",
}

_BATCHES = {
    "training batches": "of the training batches",
    "probe batch": "of a probe batch: the same at every step",
}


def run_card(run: Run) -> str:
    """What one run is: model, blocks, what was measured how, versions on request."""
    kinds = ", ".join(f"{count} {escape(kind)}" for kind, count in Counter(run.kinds).items())
    attrs = run.data.attrs
    facts = {
        "model": f"{escape(str(attrs['model_class']))}, {int(attrs['parameters']):,} parameters",
        "blocks": f"{kinds}, in the order {escape(kind_pattern(run.kinds))}; {run.depth + 1} states of stream "
        f"“{escape(str(attrs['stream']))}”",
        "measured": _measured(run),
        "tokens": escape(_BATCHES.get(str(attrs["measured"]), str(attrs["measured"]))),
        "states": escape(_STATES.get(str(attrs["states"]), str(attrs["states"]))),
        "CKA": f"{escape(str(attrs['cka_estimator']))} estimator",
        "first tokens left out": escape(str(run.config.get("skip_first_tokens", "not recorded"))),
    }
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    versions = json.loads(attrs["versions"])
    more = {**versions, **{f"config: {name}": value for name, value in run.config.items()}}
    rows = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in more.items())
    return (
        f"<article><h3>{run_name(run)}{' <small>baseline</small>' if run.baseline else ''}</h3><dl>{items}</dl>"
        f"<details><summary>versions and configuration</summary><dl>{rows}</dl></details></article>"
    )


def _measured(run: Run) -> str:
    """Snapshots, their steps, tokens and times."""
    count = len(run.steps)
    if count == 0:
        return "<strong>no snapshot yet</strong>"
    tokens, sequences = run.values("tokens"), run.values("sequences")
    start, end = (datetime.fromtimestamp(time, UTC) for time in run.values("time")[[0, -1]])
    size, written = f"{_span(tokens)} tokens in {_span(sequences)} sequences", f"{start:%Y-%m-%d %H:%M}"
    if count == 1:
        return f"1 snapshot, step {run.steps[0]:,}; {size}; written {written} UTC"
    until = end.strftime("%H:%M" if end.date() == start.date() else "%Y-%m-%d %H:%M")
    steps = f"{run.steps[0]:,} – {run.steps[-1]:,}"
    return f"{count:,} snapshots, steps {steps}; {size} each; written {written} – {until} UTC"


def _span(values: Floats) -> str:
    """One number if they are all the same, else the median and the range."""
    low, high = values.min(), values.max()
    return f"{low:,.0f}" if low == high else f"{np.median(values):,.0f} ({low:,.0f} – {high:,.0f})"


def differences(runs: Sequence[Run]) -> list[str]:
    """Choices in which the runs differ and which forbid comparing their values outright, as HTML sentences."""
    choices = {
        "kinds of batches": [str(run.data.attrs["measured"]) for run in runs],
        "CKA estimators": [str(run.data.attrs["cka_estimator"]) for run in runs],
        "conventions for states": [str(run.data.attrs["states"]) for run in runs],
        "numbers of first tokens left out": [str(run.config.get("skip_first_tokens")) for run in runs],
    }
    return [
        f"The runs use different {name} ({escape(', '.join(sorted(set(values))))}): do not compare what depends on it."
        for name, values in choices.items()
        if len(set(values)) > 1
    ]


def landmarks(depth: int) -> tuple[int, int, int]:
    """The first, the middle and the last state."""
    return 0, depth // 2, depth


def summary_table(runs: Sequence[Run]) -> str:
    """First and last value of what matters most, one row per run."""
    similarity_heads = [f"inter-token similarity, {which} state" for which in ("first", "middle", "last")]
    head = ["run", "loss", *similarity_heads, "V<sub>loc</sub>", "V<sub>glob</sub>", "CKA, first to last state"]
    rows = []
    for run in runs:
        similarity = run.values("inter_token")
        cells = [_loss_change(run)]
        for state in landmarks(run.depth):
            cells.append(f"{_change(run, similarity[:, state])}<small>state {state}</small>")
        cells += [_change(run, run.values(name)) for name in ("v_loc", "v_glob")]
        cells.append(_change(run, run.values("cka")[:, 0, -1]))
        rows.append([run_name(run), *cells])
    return table("First and last values", head, rows)


def _loss_change(run: Run) -> str:
    """Of the first logged value that is called a loss."""
    name = next((name for name in run.scalars if "loss" in name.lower()), None)
    if name is None:
        return "not logged"
    return _change(run, run.values(name)) + ("" if name == "loss" else f"<small>{escape(name)}</small>")


def _change(run: Run, values: Floats) -> str:
    """`first → last`; where the first or last snapshot has no value, the nearest one that has, with its step."""
    known = np.flatnonzero(np.isfinite(values))
    if known.size == 0:
        return "n/a"

    def at(index: int, edge: int) -> str:
        aside = "" if index == edge else f" <small>(step {run.steps[index]:,})</small>"
        return number(float(values[index])) + aside

    return f"{at(int(known[0]), 0)}\u00a0→\u00a0{at(int(known[-1]), len(values) - 1)}"


def health_table(runs: Sequence[Run]) -> str:
    """What went wrong in any snapshot, and what the monitor itself cost, one row per run."""
    head = [
        "run",
        "non-finite tokens",
        "zero tokens",
        "largest share of one token in HSIC",
        "overhead per snapshot, median (max)",
        "overhead in all",
    ]
    rows = []
    for run in runs:
        rows.append(
            [
                run_name(run),
                _count(run, "nonfinite"),
                _count(run, "zero"),
                _largest(run, run.values("hsic_top_token")),
                *_overhead(run),
            ]
        )
    return table("Health of the runs", head, rows)


def _count(run: Run, name: str) -> str:
    """How many snapshots and states have such tokens, and since when."""
    counts = run.values(name)
    bad_steps = np.flatnonzero(counts.any(axis=1))
    if bad_steps.size == 0:
        return f"none in {len(counts):,} snapshots"
    bad_states = np.flatnonzero(counts.any(axis=0))
    worst = int(counts.max())
    return (
        f"<strong>in {len(bad_steps):,} of {len(counts):,} snapshots</strong>, first at step "
        f"{run.steps[bad_steps[0]]:,}; {_states(bad_states)}; up to {worst:,} tokens of a state"
    )


def _states(found: NDArray[np.int64]) -> str:
    return f"state {found[0]}" if len(found) == 1 else f"{len(found)} states, {found[0]} to {found[-1]}"


def _largest(run: Run, values: Floats) -> str:
    if not np.isfinite(values).any():
        return "n/a"
    step, state = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return f"{number(float(values[step, state]))} at step {run.steps[step]:,}, state {state}"


def _overhead(run: Run) -> tuple[str, str]:
    """Of a snapshot, and of all with its share of the wall time between the first and the last snapshot."""
    overhead = run.values("overhead_ms")
    if not np.isfinite(overhead).any():
        return "n/a", "n/a"
    single = f"{number(float(np.nanmedian(overhead)))} ms ({number(float(np.nanmax(overhead)))} ms)"
    total = f"{number(float(np.nansum(overhead)) / 1000)} s"
    times = run.values("time")
    wall = float(times[-1] - times[0])
    if wall <= 0:
        return single, total
    # The first snapshot was written when its own overhead had passed: only the others fall between the two times.
    return single, f"{total}, {number(float(np.nansum(overhead[1:])) / 10 / wall, 2)} % of the time"
