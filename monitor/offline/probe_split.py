"""Which samples a probe learns from, and which it is judged by."""

import numpy as np
from jaxtyping import Bool, Int64

from repflow.monitor.offline import OfflineError

_PASSES = 20  # at most: they end where nothing changes sides


def stratified_group_split(
    labels: Int64[np.ndarray, " N"], contexts: Int64[np.ndarray, " N"], *, validation: float, seed: int
) -> Bool[np.ndarray, " N"]:
    """True for the samples of validation: as nearly as possible the same share of every class, contexts undivided.

    Contexts are taken in random order, several times. One changes sides if that brings the counts of all classes nearer
    to their targets, in squared distance. All begin on the side of training.

    Args:
        labels: classes from 0.
        contexts: samples of equal number belong together.
        validation: share of the samples, between 0 and 1.
        seed: of the order.

    Raises:
        OfflineError: a class is missing on one of the two sides.
    """
    draw = np.random.default_rng(seed)
    _, groups = np.unique(contexts, return_inverse=True)
    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    target = validation * counts.sum(0)
    held = np.zeros_like(target)
    chosen = np.zeros(len(counts), dtype=bool)
    order = draw.permutation(len(counts))
    for _ in range(_PASSES):
        before = chosen.copy()
        for group in order:
            count, sign = counts[group], -1 if chosen[group] else 1
            # ‖target − held − sign·count‖² < ‖target − held‖²
            if count @ (2 * sign * (target - held) - count) > 0:
                held += sign * count
                chosen[group] = not chosen[group]
        if (chosen == before).all():
            break
    split = chosen[groups]
    for side, told in ((split, "to judge by"), (~split, "to learn from")):
        if missing := sorted(set(labels.tolist()) - set(labels[side].tolist())):
            raise OfflineError(
                f"probes: expected samples of all {len(target)} classes {told}, found none of class {missing[0]}; take "
                f"more than {len(labels)} samples, or more contexts than {len(counts)}"
            )
    return split


def released_split(labels: Int64[np.ndarray, " N"], *, validation: float) -> Bool[np.ndarray, " N"]:
    """True for the last samples once they are sorted by class: classes at the end are never learned.

    So does the code that the paper builds on. Contexts are divided.
    """
    order = np.argsort(labels, kind="stable")
    split = np.zeros(len(labels), dtype=bool)
    split[order[round((1 - validation) * len(labels)) :]] = True
    return split
