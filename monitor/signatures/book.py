"""`SignatureBook`: the signatures of one run, and what they have seen so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from repflow.monitor.alert import Alert
from repflow.monitor.signatures._base import Signature
from repflow.monitor.snapshot import BlockInfo, Snapshot
from repflow.monitor.warning import warn


@dataclass
class _Seen:
    """What one signature has seen, in plain values."""

    raised: bool = False
    streaks: list[int] = field(default_factory=list)
    """Violations in a row up to now, of each state."""
    past: list[list[float]] = field(default_factory=list)
    """What its last readings remembered."""


class SignatureBook:
    """Judges the snapshots of a run, in order, by a set of signatures.

    A signature that fails is left out for the rest of the run, with one warning.

    Args:
        signatures: the rules; each needs a name of its own.
    """

    def __init__(self, signatures: Sequence[Signature]) -> None:
        self._signatures = tuple(signatures)
        self._seen = {signature.name: _Seen() for signature in self._signatures}
        self._failed: set[str] = set()

    @property
    def raised(self) -> dict[str, bool]:
        """Name of each signature -> whether it is raised now."""
        return {name: seen.raised for name, seen in self._seen.items()}

    def judged(self, snapshot: Snapshot, blocks: Sequence[BlockInfo]) -> Snapshot:
        """The snapshot with its alerts."""
        alerts = self.judge(snapshot, blocks)
        return replace(snapshot, alerts=alerts, signatures=self.raised)

    def judge(self, snapshot: Snapshot, blocks: Sequence[BlockInfo]) -> tuple[Alert, ...]:
        """The alerts that a snapshot raises: those that were not raised already."""
        alerts: list[Alert] = []
        for signature in self._signatures:
            if signature.name in self._failed or snapshot.step < signature.warmup_steps:
                continue
            try:
                alert = _judge(signature, self._seen[signature.name], snapshot, blocks)
            except Exception as error:
                self._failed.add(signature.name)
                self._seen[signature.name] = _Seen()
                warn(
                    f"the signature {signature.name!r} failed at step {snapshot.step} and is left out for the rest of "
                    f"the run; the others go on. {type(error).__name__}: {error}"
                )
                continue
            if alert is not None:
                alerts.append(alert)
        return tuple(alerts)

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, in plain values: a run that is resumed with it raises nothing twice."""
        return {
            name: {"raised": seen.raised, "streaks": list(seen.streaks), "past": [list(row) for row in seen.past]}
            for name, seen in self._seen.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Signatures that it does not know begin anew; others that it knows are ignored."""
        for name in self._seen.keys() & state.keys():
            known = {entry.name: state[name][entry.name] for entry in fields(_Seen) if entry.name in state[name]}
            self._seen[name] = _Seen(**known)


def _judge(signature: Signature, seen: _Seen, snapshot: Snapshot, blocks: Sequence[BlockInfo]) -> Alert | None:
    """Read a snapshot, and take note of what is seen. What was seen of another number of states is forgotten."""
    count = len(snapshot.norms)
    if len(seen.streaks) != count:
        seen.raised, seen.streaks, seen.past = False, [0] * count, []
    past = torch.tensor(seen.past, dtype=torch.float64).reshape(-1, count)
    reading = signature.read(snapshot, blocks, past)
    if reading is None:
        return None
    if reading.remember is not None and signature.history:
        seen.past = [*seen.past, reading.remember.tolist()][-signature.history :]
    threshold = torch.full_like(reading.values, signature.threshold) if reading.threshold is None else reading.threshold
    measured = ~reading.values.isnan()
    _count(seen, (reading.values > threshold).tolist(), measured.tolist())
    states = [state for state, streak in enumerate(seen.streaks) if streak >= signature.patience]
    if not seen.raised and states:
        seen.raised = True
        return _alert(signature, snapshot.step, blocks, states, reading.values, threshold)
    still = any(seen.streaks) or bool((reading.values > signature.release).any())
    if seen.raised and measured.any() and not still:
        seen.raised = False
    return None


def _count(seen: _Seen, violated: Sequence[bool], measured: Sequence[bool]) -> None:
    """Lengthen the streaks of the states that violate, end the others; what was not measured stays as it is."""
    seen.streaks = [
        streak if not known else streak + 1 if bad else 0
        for streak, bad, known in zip(seen.streaks, violated, measured, strict=True)
    ]


def _alert(
    signature: Signature,
    step: int,
    blocks: Sequence[BlockInfo],
    states: Sequence[int],
    values: Tensor,
    threshold: Tensor,
) -> Alert:
    first = states[0]
    worst = max(states, key=lambda state: float(values[state] - threshold[state]))
    reading = signature.reading[0].upper() + signature.reading[1:]
    message = f"{reading}: {signature.show(float(values[first]))} at {_place(first, blocks)}"
    if worst != first:
        message += f", and up to {signature.show(float(values[worst]))} at state {worst}"
    message += f"; expected at most {signature.show(float(threshold[worst]))}"
    if len(states) > 1:
        message += f"; so it is at states {_ranges(states)}"
    if signature.patience > 1:
        message += f"; seen in {signature.patience} snapshots in a row"
    if remark := signature.remark(states):
        message += f"; {remark}"
    return Alert(
        step=step,
        signature=signature.name,
        severity=signature.severity,
        title=signature.title,
        message=message,
        suggestion=signature.suggestion,
        states=tuple(states),
        value=float(values[worst]),
        threshold=float(threshold[worst]),
    )


def _place(state: int, blocks: Sequence[BlockInfo]) -> str:
    """A state in words."""
    if state == 0:
        return "state 0, what enters the first block"
    block = blocks[state - 1]
    return f"state {state}, the output of block {block.index} '{block.name}' ({block.kind})"


def _ranges(states: Sequence[int]) -> str:
    """Ascending numbers, runs of them as one: `1, 3–8`."""
    runs = [[state for _, state in run] for _, run in groupby(enumerate(states), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
