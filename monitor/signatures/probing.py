"""The signature of offline runs: a probe reads less from the last layer than from one before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from repflow.monitor.alert import Alert, Severity


@dataclass(frozen=True, kw_only=True)
class ProbingDrop:
    """The accuracy of a linear probe falls from its peak layer to the last.

    **Rule.** The value is max_l accuracy(l) − accuracy(S−1), a difference of accuracies, as the paper gives it: .15
    are 15 points of 100. It is judged once, on a finished curve, so that there is neither patience nor release.

    **Source.** arXiv 2510.06640, Table 1 and Finding 3.4.1: drops of up to 26 points in transformers, 20.6 in state-
    space models; .15 as the sign of capacity that the last layer does not use is the reading of a digest of the
    paper.

    **How to read it.** The model knows more in the middle than its last layer offers to a linear reader. That alone
    is no fault of a language model, whose last layer predicts the next token; it is one of using the last layer as
    features.

    Raises:
        ValueError: a threshold out of its range.
    """

    name: str = "probing_drop"
    severity: Severity = "warning"
    threshold: float = 0.15

    title: ClassVar[str] = "Probing accuracy falls from its peak to the last layer"
    suggestion: ClassVar[str] = (
        "Read features from the peak layer; to make the last one keep them, supervise intermediate layers, or let a "
        "task's head read several"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`ProbingDrop`: expected threshold to be from 0 to 1, got {self.threshold!r}")


def judge_probing(
    accuracy: Float[Tensor, " S"] | Sequence[float], *, rule: ProbingDrop | None = None, step: int = 0
) -> Alert | None:
    """Hold the accuracy of a probe at every state against a rule.

    Args:
        accuracy: of each state, from 0 to 1; NaN where there is none.
        rule: `ProbingDrop()` if None.
        step: that of the checkpoint, for the alert.

    Returns:
        The alert, of the peak and the last state; None if the drop is no larger than the threshold, or not known.

    Raises:
        ValueError: accuracies that are not from 0 to 1, or none at all.
    """
    rule = rule or ProbingDrop()
    curve = torch.as_tensor(accuracy, dtype=torch.float64)
    if curve.ndim != 1 or not len(curve) or bool(((curve < 0) | (curve > 1)).any()):
        raise ValueError(
            f"`judge_probing`: expected the accuracy of each state, from 0 to 1, got {curve.tolist()}; divide "
            "percentages by 100"
        )
    if curve[-1].isnan():
        return None
    peak, last = int(curve.nan_to_num(nan=-1.0).argmax()), len(curve) - 1
    drop = float(curve[peak] - curve[last])
    if drop <= rule.threshold:
        return None
    return Alert(
        step=step,
        signature=rule.name,
        severity=rule.severity,
        title=rule.title,
        message=(
            f"Accuracy is {float(curve[peak]):.3f} at state {peak} and {float(curve[last]):.3f} at the last, state "
            f"{last}: a drop of {drop:.3f}, above {rule.threshold:g}"
        ),
        suggestion=rule.suggestion,
        states=(peak, last),
        value=drop,
        threshold=rule.threshold,
    )
