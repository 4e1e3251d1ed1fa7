"""Which samples run together: sequences of like length, so that little is padding."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[Int64[np.ndarray, " _"]]:
    """Numbers of the samples of each batch, the shortest samples first.

    A batch has at most `batch_tokens` tokens, padding included, and at least one sample.
    """
    order = np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable")
    batches: list[list[int]] = []
    for number in order.tolist():
        # The last one of a batch is its longest.
        if batches and (len(batches[-1]) + 1) * lengths[number] <= batch_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return [np.array(batch, dtype=np.int64) for batch in batches]


def pad(rows: Sequence[Int32[np.ndarray, " _"]]) -> tuple[Int64[Tensor, "R T"], Bool[Tensor, "R T"] | None]:
    """Tokens padded on the right, and a mask that is False there; None where all rows are of one length.

    On the right nothing that comes before is moved. The last tokens are told by the mask.
    """
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[place, : len(row)] = True
    return ids, None if bool(mask.all()) else mask
