"""The term of one micro-batch at one layer: its gradient, and what is kept of it until the optimizer step ends."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from repflow.monitor.functional.contrastive import contrastive_gradient
from repflow.triton_kernels import similarity_gradient
from repflow.triton_kernels.groups import Groups, find_groups


class TermGradient(NamedTuple):
    """A gradient with that of the term, and what was measured on the way."""

    gradient: Float[Tensor, "B T D"]
    similarity: Float64[Tensor, ""]
    """NaN without a sequence of two tokens."""
    value: Float64[Tensor, ""]
    """The term without λ: max(0, similarity − target), or its mean over pairs of tokens; NaN alike."""
    onto_square: Float64[Tensor, ""]
    """‖the gradient that arrived‖²."""
    added_square: Float64[Tensor, ""]
    """‖what was added to it‖²."""


class StepMeasures(NamedTuple):
    """Of an optimizer step, over all ranks."""

    similarity: Float64[Tensor, " L"]
    """Of each layer, the mean over micro-batches."""
    value: Float64[Tensor, " L"]
    """The term without λ, likewise."""
    ratio: Float64[Tensor, " L"]
    """‖what was added‖/‖the gradient that arrived‖ at each layer."""
    faults: Float64[Tensor, "2"]
    """Documents without room, and forwards with a negative scale."""


class Sums:
    """Sums over the micro-batches of an optimizer step, on the device.

    For each layer: the similarity and the value of the term and how often they were numbers, and the squares of both
    gradients; at the end, how many documents found no room, and how many forwards had a negative scale.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self._flat = torch.zeros(5 * layers + 2, dtype=torch.float64, device=device)
        self._rows = self._flat[:-2].view(5, layers)
        self.recorded = [0] * layers
        """Gradients that have come back at each layer."""

    def add(self, layer: int, result: TermGradient) -> None:
        """Add those of one micro-batch."""
        known = ~result.similarity.isnan()
        measured = [torch.where(known, number, 0.0) for number in (result.similarity, result.value)]
        values = [*measured, known.double(), result.onto_square, result.added_square]
        self._rows[:, layer] += torch.stack(values).to(self._flat.device)
        self.recorded[layer] += 1

    def leave_out(self, documents: Tensor) -> None:
        """Note documents for which there was no room."""
        self._flat[-2] += documents.clamp(min=0).to(self._flat.device)

    def note_scale(self, scale: Tensor | float) -> None:
        """Note what the loss of one forward is multiplied with, if that is negative."""
        self._flat[-1] += scale < 0 if isinstance(scale, float | int) else (scale < 0).to(self._flat.device)

    def take(self, group: "dist.ProcessGroup | None") -> StepMeasures:
        """Of all ranks, and begin anew."""
        flat = self._flat.clone()
        self._flat.zero_()
        self.recorded = [0] * len(self.recorded)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(flat, group=group)
        similarity, value, number, onto, added = flat[:-2].view(5, -1)
        return StepMeasures(similarity / number, value / number, (added / onto).sqrt(), flat[-2:])


def term_gradient(
    state: Float[Tensor, "B T D"],
    groups: Groups | Bool[Tensor, "B T"] | None,
    weight: Float64[Tensor, ""],
    target: float,
    onto: Float[Tensor, "B T D"],
    *,
    contrastive: bool,
    apart: bool,
) -> TermGradient:
    """`onto` and the gradient of weight · term; of the latter alone if `apart`."""
    if contrastive:
        measured = similarity_gradient(state, groups, weight=0.0)
        if not isinstance(groups, Groups):
            groups = find_groups(
                torch.ones(state.shape[:2], dtype=torch.bool, device=state.device) if groups is None else groups
            )
        gradient, value = contrastive_gradient(state, groups, target)
        push = weight * gradient.double()
        changed = push.to(state.dtype) if apart else torch.where(push == 0, onto, (onto + push).to(onto.dtype))
        arrived = onto.double().square().sum()
        return TermGradient(changed, measured.similarity, value, arrived, push.square().sum())
    found = similarity_gradient(state, groups, weight=weight, target=target, onto=None if apart else onto)
    arrived = onto.double().square().sum() if apart else found.onto_square
    value = (found.similarity - target).clamp(min=0)
    return TermGradient(found.gradient, found.similarity, value, arrived, found.added_square)
