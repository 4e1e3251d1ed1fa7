"""The term of one micro-batch at one layer: its gradient, and what is kept of it until the optimizer step ends."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from repflow.monitor.functional.contrastive import contrastive_gradient
from repflow.monitor.masks import CallMasks, token_groups
from repflow.triton_kernels import SimilarityGradient, similarity_gradient
from repflow.triton_kernels._dispatch import use_triton
from repflow.triton_kernels.groups import Groups, find_groups


class Sums:
    """Sums over the micro-batches of an optimizer step, on the device.

    For each layer: the similarity and how often it was one, and the squares of both gradients; at the end, how many
    documents found no room.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self._flat = torch.zeros(4 * layers + 1, dtype=torch.float64, device=device)
        self._rows = self._flat[:-1].view(4, layers)
        self.recorded = 0
        """Gradients that have come back."""

    def add(self, layer: int, result: SimilarityGradient) -> None:
        """Add those of one micro-batch."""
        similarity = result.similarity
        known = ~similarity.isnan()
        values = [torch.where(known, similarity, 0.0), known.double(), result.onto_square, result.added_square]
        self._rows[:, layer] += torch.stack(values).to(self._flat.device)
        self.recorded += 1

    def leave_out(self, documents: Tensor) -> None:
        """Note documents for which there was no room."""
        self._flat[-1] += documents.clamp(min=0).to(self._flat.device)

    def take(self, group: "dist.ProcessGroup | None") -> tuple[Tensor, Tensor, Tensor]:
        """Of all ranks: similarity and gradient ratio of each layer, and documents left out; and begin anew."""
        flat = self._flat.clone()
        self._flat.zero_()
        self.recorded = 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(flat, group=group)
        total, number, onto, added = flat[:-1].view(4, -1)
        return total / number, (added / onto).sqrt(), flat[-1]


@dataclass(eq=False)
class TrainedForward:
    """A forward whose backward is still to come."""

    masks: CallMasks
    left: int
    """Layers whose gradient has not come back."""
    scale: Tensor | None = None
    """The gradient of its loss, once that is known."""
    depth: int = 1 << 30
    """Of the module that returned that loss, from the outermost one; −1: it was given to `follow`."""
    _groups: Groups | Bool[Tensor, "B T"] | None = None
    _known: bool = False

    def groups(self, state: Float[Tensor, "B T D"], room: int, sums: Sums) -> Groups | Bool[Tensor, "B T"] | None:
        """Which tokens belong together. A GPU is not waited for: for an integer mask there is room for documents."""
        if not self._known:
            rows, tokens, _ = state.shape
            masks = self.masks.of_flat_tokens() if rows == 1 else self.masks
            mask = token_groups(masks, rows, tokens)
            if mask is not None and mask.is_floating_point():
                mask = mask > 0  # given to `follow`
            if mask is not None and mask.dtype != torch.bool:
                found = find_groups(mask, rows + room if use_triton(state) else None)
                if found.found is not None:
                    sums.leave_out(found.found - found.count)
                mask = found
            self._groups, self._known = mask, True
        groups = self._groups
        if isinstance(groups, Groups):
            return groups if groups.index.device == state.device else _moved(groups, state.device)
        return None if groups is None else groups.to(state.device)


def term_gradient(
    state: Float[Tensor, "B T D"],
    groups: Groups | Bool[Tensor, "B T"] | None,
    weight: Float64[Tensor, ""],
    target: float,
    onto: Float[Tensor, "B T D"],
    *,
    contrastive: bool,
    apart: bool,
) -> SimilarityGradient:
    """`onto` and the gradient of weight · term; of the latter alone if `apart`."""
    if contrastive:
        measured = similarity_gradient(state, groups, weight=0.0)
        if not isinstance(groups, Groups):
            groups = find_groups(
                torch.ones(state.shape[:2], dtype=torch.bool, device=state.device) if groups is None else groups
            )
        push = weight * contrastive_gradient(state, groups, target)[0].double()
        added = push.square().sum()
        gradient = push.to(state.dtype) if apart else torch.where(push == 0, onto, (onto + push).to(onto.dtype))
        return SimilarityGradient(gradient, measured.similarity, onto.double().square().sum(), added)
    if not apart:
        return similarity_gradient(state, groups, weight=weight, target=target, onto=onto)
    alone = similarity_gradient(state, groups, weight=weight, target=target)
    return alone._replace(onto_square=onto.double().square().sum())


def _moved(groups: Groups, device: torch.device) -> Groups:
    return Groups(groups.index.to(device), groups.count, groups.by_row, groups.valid.to(device))
