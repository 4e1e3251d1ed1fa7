"""docs/quantities: a page for each quantity, with what the report says of it and where else it is found.

`python -m tests.quantity_pages` writes them; a test compares.
"""

from pathlib import Path
from typing import Any

import torch

from repflow.monitor.report._definitions import DEFINITIONS, Definition, definition_rows
from repflow.monitor.sinks._keys import scalar_items
from repflow.monitor.snapshot import Snapshot
from repflow.monitor.sum_layout import SumLayout

FOLDER = Path(__file__).parents[1] / "docs" / "quantities"

SHAPES = {
    (): "one number",
    (3,): "one number for each state (S = L + 1)",
    (2,): "one number for each block (L)",
    (3, 3): "one number for each pair of states (S × S)",
    (2, 64): "one number for each block and each of 64 places in the sequence",
    (2, 5): "for each state-space block the quantiles .05, .25, .5, .75 and .95; loggers get the median",
}
"""What the shapes of a model with two blocks mean."""

FUNCTIONS = {
    "inter_token": ("inter_token_similarity", "InterTokenSimilarity"),
    "adjacent": ("adjacent_layer_similarity", "AdjacentLayerSimilarity"),
    "v_loc": ("layer_local_variance", "LayerVariation"),
    "v_glob": ("layer_global_variance", "LayerVariation"),
    "cka": ("layer_cka", "LayerCKA"),
}
"""Quantity -> its function on tensors and its streaming metric."""

ALERTS = {
    "inter_token": ("early_oversmoothing", "late_homogenisation", "collapse_onset"),
    "adjacent": ("dead_blocks",),
    "cka": ("redundant_layers", "dominant_token"),
    "norms": ("norm_explosion", "massive_activations"),
    "ssm_memory": ("late_homogenisation",),
    "ssm_decay": ("late_homogenisation",),
    "hsic_top_token": ("dominant_token", "massive_activations"),
    "nonfinite": ("nonfinite",),
}
"""Quantity -> the signatures that read it, or whose suggestions name it."""


def pages() -> dict[str, str]:
    """File name -> text."""
    layout = SumLayout(3, (0, 1), probe=True)
    kind: dict[str, Any] = dict(num_states=3, ssm_blocks=(0, 1), probe=True, step=0, stream="blocks", overhead_ms=1.0)
    snapshot = Snapshot.from_sums(torch.ones(layout.size, dtype=torch.float64), **kind)
    return {f"{name}.md": page(name, definition, snapshot) for name, definition in DEFINITIONS.items()}


def page(name: str, definition: Definition, snapshot: Snapshot) -> str:
    """The page of one quantity, whose shape and key are those that a snapshot has."""
    shape = tuple(torch.as_tensor(getattr(snapshot, name)).shape)
    parts = [
        f"# {definition.title}",
        f"`{name}`: {SHAPES[shape]}.",
        *(f"**{label}.** {text}" for label, text in definition_rows(definition)),
    ]
    if name in ALERTS:
        parts.append(f"**Alerts.** {', '.join(f'[{rule}](../alerts.md#{rule})' for rule in ALERTS[name])}.")
    return "\n\n".join([*parts, _places(name, snapshot), "[All quantities](../README.md#quantities)"]) + "\n"


def _places(name: str, snapshot: Snapshot) -> str:
    """Where its values are found."""
    rows = [f"- in Python: `Snapshot.{name}`", f"- in a run file: `open_run(path).{name}`"]
    keys = [key for key in scalar_items(snapshot) if key.split("/")[1] in (name, f"{name}_first_last")]
    if keys:
        rows.append(f"- in loggers: `{keys[0]}`{' and so on' if len(keys) > 1 else ''}")
    if name in FUNCTIONS:
        function, metric = FUNCTIONS[name]
        rows.append(f"- for tensors of your own: `repflow.monitor.functional.{function}`")
        rows.append(f"- over many batches: `repflow.monitor.{metric}`")
    return "\n".join(["**Where it is.**", "", *rows])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in pages().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
