"""The scalars of a snapshot under the keys that loggers show."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from repflow.monitor.snapshot import SSM_QUANTILES, Snapshot

StateChoice = Literal["auto", "all"] | Sequence[int]
"""Which states become scalars: `all`; `auto`: all of up to 16, else the first, the last and the quarters between; or
these (negative numbers count from the last)."""

_ALL_UP_TO = 16
_MEDIAN = SSM_QUANTILES.index(0.5)


def scalar_items(snapshot: Snapshot, states: StateChoice = "auto", *, separator: str = "/") -> dict[str, float]:
    """Key -> number, such as `repflow/inter_token/state_00` or `repflow/v_loc`; the keys are the same at every step.

    A transition is named by the state that it starts from (`repflow/adjacent/transition_03` leads from state 3 to 4);
    those of the chosen states are given, and the last one for the last state. `ssm_decay` and `ssm_memory` are medians,
    of the state-space blocks among those transitions. Numbers have two digits, three for more than 100 states.
    `repflow/alerts/nonfinite` and the like are 1 while that signature is raised, else 0.

    Args:
        snapshot: What to show.
        states: Which states.
        separator: What stands between the parts of a key, such as the `group_separator` of a Lightning logger.

    Raises:
        ValueError: `states` is none of the choices, or names a state that the stream does not have.
    """
    count = len(snapshot.inter_token)
    chosen = chosen_states(count, states)
    transitions = sorted({min(state, count - 2) for state in chosen})
    interior = [state for state in chosen if 0 < state < count - 1]
    digits = max(2, len(str(count - 1)))
    items: dict[str, float] = {}

    def add(name: str, kind: str, values: Tensor, indices: Sequence[int], first: int = 0) -> None:
        numbers = values.tolist()
        for index in indices:
            items[separator.join(("repflow", name, f"{kind}_{index:0{digits}}"))] = float(numbers[index - first])

    add("inter_token", "state", snapshot.inter_token, chosen)
    add("update_inter_token", "transition", snapshot.update_inter_token, transitions)
    add("adjacent", "transition", snapshot.adjacent, transitions)
    add("norms", "state", snapshot.norms, chosen)
    add("local_variance", "state", snapshot.local_variance, interior, first=1)
    add("hsic_top_token", "state", snapshot.hsic_top_token, chosen)
    for name, quantiles in (("ssm_decay", snapshot.ssm_decay), ("ssm_memory", snapshot.ssm_memory)):
        if quantiles is not None:
            medians = quantiles[:, _MEDIAN]
            add(name, "transition", medians, [index for index in transitions if index in snapshot.ssm_blocks])
    for name, drift in (("drift_first", snapshot.drift_first), ("drift_previous", snapshot.drift_previous)):
        if drift is not None:
            add(name, "state", drift, chosen)
    for name, raised in snapshot.signatures.items():
        items[separator.join(("repflow", "alerts", name))] = float(raised)
    return items | {f"repflow{separator}{name}": value for name, value in _totals(snapshot).items()}


def chosen_states(count: int, states: StateChoice) -> list[int]:
    """The chosen ones of `count` states, in ascending order."""
    if states == "all" or (states == "auto" and count <= _ALL_UP_TO):
        return list(range(count))
    last = count - 1
    if states == "auto":
        return sorted({0, last // 4, last // 2, 3 * last // 4, last})
    if isinstance(states, str):
        raise ValueError(f'states= is expected to be "auto", "all" or a sequence of state numbers, got {states!r}')
    unknown = [state for state in states if not -count <= state < count]
    if unknown:
        raise ValueError(f"states= is expected to name states from 0 to {last} of this stream, got {unknown}")
    return sorted({state % count for state in states})


def _totals(snapshot: Snapshot) -> dict[str, float]:
    """The scalars of the whole stream."""
    return {
        "v_loc": float(snapshot.v_loc),
        "v_glob": float(snapshot.v_glob),
        "v_loc_rel": float(snapshot.v_loc_rel),
        "v_glob_rel": float(snapshot.v_glob_rel),
        "cka_first_last": float(snapshot.cka[0, -1]),
        "nonfinite": float(snapshot.nonfinite.sum()),
        "zero": float(snapshot.zero.sum()),
        "tokens": float(snapshot.tokens),
        "sequences": float(snapshot.sequences),
        "overhead_ms": float(snapshot.overhead_ms),
    }
