"""The gradient of inter-token similarity: what is compared, and how far each is from float64."""

from collections.abc import Callable

import torch
from _cases import Case
from _measure import Product, Timing, graphed, largest_error, run_once, time_call
from torch import Tensor
from torch.nn.functional import normalize

from repflow.triton_kernels import SimilarityGradient, similarity_gradient
from repflow.triton_kernels._dispatch import Implementation, force, use_triton

QUANTITY = "similarity gradient"


def tolerances(case: Case) -> dict[str, float]:
    """Of the similarity, absolute; of the gradient, relative to its largest entry: a step of its dtype."""
    return {"cosine_error": 1e-5, "v_error": max(1e-5, torch.finfo(case.dtype).eps)}


def floor(case: Case, states: Tensor, product: Product) -> Timing:
    """Two reads of the state and one write: a read, and a copy.

    Raises:
        RuntimeError: the copy is not the state.
    """
    from _floors import read_once

    read, target = read_once(states), torch.empty_like(states)

    def copy() -> Tensor:
        return target.copy_(states)

    run_once(copy, states.device)
    run = run_once(copy, states.device)
    if not torch.equal(target, states):
        raise RuntimeError("floor: expected the copy to be the state")
    copied = time_call(copy, run.ms, states.device)
    low, high = (
        None if one is None or other is None else one + other
        for one, other in ((read.ms_p20, copied.ms_p20), (read.ms_p80, copied.ms_p80))
    )
    return Timing(read.ms + copied.ms, low, high, f"{read.timing}, twice")


def calls(case: Case, states: Tensor, mask: Tensor | None) -> dict[str, Callable[[], object]]:
    """The implementations, the float64 reference first. What is written in PyTorch here knows no mask."""
    state = states[0]
    # Of a mean over so many pairs, float16 holds nothing without the scale that a GradScaler begins with.
    scale = 2.0**16 if state.dtype == torch.float16 else 1.0
    weight = torch.full((), scale, dtype=torch.float64, device=states.device)

    def repflow(implementation: Implementation) -> SimilarityGradient:
        with force(implementation):
            if use_triton(states) != (implementation == "triton"):
                raise RuntimeError(f"repflow does not take {implementation} for these states")
            return similarity_gradient(state, mask, weight=weight)

    found: dict[str, Callable[[], object]] = {"reference": lambda: repflow("reference")}
    if mask is None:
        found["autograd, all pairs"] = lambda: by_autograd(state, all_pairs, scale)
        found["autograd, closed form"] = lambda: by_autograd(state, closed_form, scale)
    found |= {"repflow": lambda: repflow("triton")}
    if states.is_cuda:
        found["repflow, CUDA graph"] = graphed(found["repflow"])
    return found


@torch.enable_grad()
def by_autograd(state: Tensor, similarity: Callable[[Tensor], Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Gradient, times the scale, and similarity; in float32."""
    given = state.detach().requires_grad_()
    value = similarity(given)
    (gradient,) = torch.autograd.grad(scale * value, given)
    return gradient, value.detach()


def all_pairs(state: Tensor) -> Tensor:
    """The cosines of all pairs, as one writes it down first."""
    unit, tokens = normalize(state.float(), dim=-1), state.shape[1]
    cosine = unit @ unit.mT
    pairs = cosine.sum((-2, -1)) - cosine.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (pairs / (tokens * (tokens - 1))).mean()


def closed_form(state: Tensor) -> Tensor:
    """(‖s‖² − n)/(n(n − 1)), from the sum s of unit vectors."""
    tokens = state.shape[1]
    total = normalize(state.float(), dim=-1).sum(1)
    return ((total.square().sum(-1) - tokens) / (tokens * (tokens - 1))).mean()


def errors(got, truth) -> dict[str, float]:
    """The error of the similarity, absolute, and of the gradient, as a share of its largest entry."""
    largest = truth[0].double().abs().max()
    return {
        "cosine_error": largest_error(got[1], truth[1]),
        "v_error": largest_error(got[0].double() / largest, truth[0].double() / largest),
    }
