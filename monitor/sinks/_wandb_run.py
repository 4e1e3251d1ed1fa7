"""What a W&B run is told besides its history: which panels and summaries its keys get, and alerts. Needs no wandb."""

import re
from collections.abc import Iterable
from typing import Any

from repflow.monitor.alert import Alert, Severity

STEP = "repflow/step"
"""The step that was measured: the axis of everything that repflow logs to W&B."""
_LEVELS: dict[Severity, str] = {"info": "INFO", "warning": "WARN", "error": "ERROR"}
_SUMMARIES = {"alerts": "max", "nonfinite": "max", "zero": "max", "overhead_ms": "mean"}
"""What the summary holds of a key, by the name in it, where the last value would not do: a sweep or a table of runs
sees in `repflow/alerts/nonfinite.max` whether it was ever raised. All others have the last value under their key."""

_NUMBERED = re.compile(r"repflow/\w+/(state|transition)_(\d+)")


def is_wandb_run(experiment: object) -> bool:
    """Whether the `experiment` of a logger is a W&B run."""
    return type(experiment).__module__.split(".")[0] == "wandb"


def summarised(key: str) -> str | None:
    """How the summary of a key is made, if not by its last value."""
    return _SUMMARIES.get(key.split("/")[1])


def define_keys(run: Any, keys: Iterable[str], *, num_states: int) -> None:
    """Define each key by its full name, which wins over patterns such as `*` that the training loop may have defined.

    All are shown over `STEP`, whatever the axis of the loop's own metrics.

    W&B makes a panel of every key, in a section for each prefix. Of a quantity with many states it makes them of the
    first, the last and the quarters between; the others are hidden, which keeps them for panels that name them.
    """
    last = num_states - 1
    shown = {0, last // 4, last // 2, 3 * last // 4, last}
    shown_of = {"state": shown, "transition": {min(state, last - 1) for state in shown}}
    run.define_metric(STEP, step_metric=STEP, hidden=True)
    for key in keys:
        numbered = _NUMBERED.fullmatch(key)
        hidden = numbered is not None and int(numbered[2]) not in shown_of[numbered[1]]
        run.define_metric(key, step_metric=STEP, hidden=hidden or None, summary=summarised(key))


def send_alerts(run: Any, alerts: Iterable[Alert]) -> None:
    """Have W&B tell its user, by mail or Slack as that is set up."""
    for alert in alerts:
        text = f"Step {alert.step}: {alert.message}. {alert.suggestion}."
        run.alert(title=alert.title, text=text, level=_LEVELS[alert.severity])
