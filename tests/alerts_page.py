"""docs/alerts.md, from the signatures themselves: their docstrings, fields and suggestions.

`python -m tests.alerts_page` writes it; with `--check` it only says whether it is up to date.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from repflow.monitor.signatures import DEFAULT, ProbingDrop, Signature

PAGE = Path(__file__).parents[1] / "docs" / "alerts.md"

INTRODUCTION = """\
# Alerts

Written by `python -m tests.alerts_page` from the signatures themselves; a test compares.

A failure signature is a named rule over snapshots. The monitor judges every snapshot as it arrives on the host; a
signature that is seen raises an alert: once, not at every step, with the layers, the numbers and what to do. A rule
that fails is left out with a warning: it never harms the run.

| signature | severity | an alert says |
|---|---|---|
{table}

## Where alerts go

| place | what |
|---|---|
| terminal | one `AlertWarning`, on rank 0 |
| run file | `open_run(path).attrs["alerts"]`: a JSON list of objects with the fields of `Alert` |
| `repflow report` | reads them from the run file |
| W&B | `run.alert`, which sends mail or Slack as your settings there say; also in offline runs |
| TensorBoard | text under `repflow/alerts` |
| every logger, and Lightning's `callback_metrics` | `repflow/alerts/<name>`: 1 while the signature is raised, else 0 |
| your code | `Snapshot.alerts`, those that a step raised; `Snapshot.signatures`, which are raised now |

With several ranks all of them judge the same sums, and raise the same alerts. The checkpoints of
both Trainers keep what was raised, so that a resumed run does not repeat it; in other loops `monitor.state_dict()` and
`monitor.load_state_dict()` do that. A curve of zeros and ones can end a run:
`EarlyStopping("repflow/alerts/nonfinite", divergence_threshold=0.5, patience=10**9)`.

## When a signature is raised

It reads one value of every state. It is raised when the value of one and the same state is above `threshold` in
`patience` snapshots in a row, and can be raised again only after no value is above `release`. Values that could not be
measured (NaN) neither count nor interrupt. Snapshots of steps before `warmup_steps` are not looked at: a model at its
initialisation, and in the first steps, in which it learns how frequent each token is, is beyond several thresholds for
good reasons. With a longer warm-up of the learning rate, raise it.

Every threshold is one for language models as they are trained usually, not a border that was proven: each section
says where it comes from. "The models of `repflow demo`" are its small ones, which raise nothing; those of
`--size medium` and `--size large`, which need a GPU, have not been measured for this.

## Choosing

```python
from repflow.monitor import MonitorConfig
from repflow.monitor.signatures import DEFAULT, CollapseOnset, EarlyOversmoothing, NonFinite

MonitorConfig(signatures=())  # none
MonitorConfig(signatures=(NonFinite(), CollapseOnset(patience=5, warmup_steps=2000)))
MonitorConfig(signatures=(*DEFAULT, EarlyOversmoothing(name="strict", threshold=0.6, release=0.5, severity="info")))
```

The same as an option of the Lightning callback: `RepresentationMonitor(signatures=...)`. Names must differ, for they
are the keys in loggers. Every signature has these fields, besides its own:

{common}

A rule of your own is a frozen dataclass:

```python
from dataclasses import dataclass
from typing import ClassVar

import torch

from repflow.monitor import MonitorConfig, Signature
from repflow.monitor.signatures import DEFAULT, Reading


@dataclass(frozen=True, kw_only=True)
class UnevenDepth(Signature):
    name: str = "uneven_depth"
    severity: str = "info"
    patience: int = 3
    warmup_steps: int = 200
    threshold: float = 0.5
    release: float = 0.4

    title: ClassVar[str] = "States change unevenly over depth"
    reading: ClassVar[str] = "V_loc relative to the scale of the states"
    suggestion: ClassVar[str] = "See local_variance for the layer"

    def read(self, snapshot, blocks, past):
        values = torch.full_like(snapshot.norms, torch.nan)  # one for each state; NaN: nothing to say
        values[-1] = snapshot.v_loc_rel
        return Reading(values=values)


MonitorConfig(signatures=(*DEFAULT, UnevenDepth()))
```

"""

OFFLINE = """
It is for finished curves of offline runs, and is called with the accuracy of a probe at every state:

```python
from repflow.monitor.signatures import judge_probing

alert = judge_probing([0.31, 0.62, 0.58, 0.44])
print(alert)
```
"""


def page() -> str:
    """The whole page."""
    rules = (*DEFAULT, ProbingDrop())
    table = "\n".join(f"| [`{rule.name}`](#{rule.name}) | {rule.severity} | {rule.title} |" for rule in rules)
    common = _table(Signature, {field.name: "" for field in fields(Signature)}, with_default=False)
    text = INTRODUCTION.replace("{table}", table).replace("{common}", common)
    return text + "\n".join(_section(rule) for rule in rules) + OFFLINE


def _section(rule: Any) -> str:
    summary, *paragraphs = inspect.cleandoc(type(rule).__doc__ or "").split("\n\n")
    body = [paragraph for paragraph in paragraphs if not paragraph.startswith("Raises:")]
    todo = f"**What to do.** {rule.suggestion}."
    defaults = {field.name: getattr(rule, field.name) for field in fields(rule)}
    parts = [
        f"## {rule.name}",
        summary,
        *body,
        todo,
        f"**Fields of `{type(rule).__name__}`.**",
        _table(type(rule), defaults),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rule: type, defaults: dict[str, Any], with_default: bool = True) -> str:
    known = dict(_documented(Signature)) | dict(_documented(rule))
    head = ["| field | default | |", "|---|---|---|"] if with_default else ["| field | |", "|---|---|"]
    shown = ((f"`{_show(value)}` | " if with_default else "") for value in defaults.values())
    rows = [f"| `{name}` | {default}{known.get(name, '')} |" for name, default in zip(defaults, shown, strict=True)]
    return "\n".join(head + rows)


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _documented(rule: type) -> Iterator[tuple[str, str]]:
    """Name and docstring of each field of a class."""
    (definition,) = ast.parse(inspect.getsource(rule)).body
    assert isinstance(definition, ast.ClassDef)
    for field, following in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(following.value, ast.Constant)
            yield field.target.id, " ".join(str(following.value.value).split())


def main(arguments: list[str]) -> int:
    text = page()
    if arguments != ["--check"]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is not what the signatures say; run: python -m tests.alerts_page")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
