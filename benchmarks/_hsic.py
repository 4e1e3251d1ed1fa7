"""HSIC of every pair of states: what is compared, and how far the CKA of each is from float64."""

from collections.abc import Callable

import torch
from _cases import Case
from _measure import Product, Timing, compiled, graphed, largest_error
from _peers import peer_calls
from torch import Tensor

from repflow.monitor.functional.cka import cka_from_hsic
from repflow.triton_kernels import pairwise_hsic
from repflow.triton_kernels._dispatch import Implementation, force, use_triton

QUANTITY = "pairwise HSIC"


def tolerances(case: Case) -> dict[str, float]:
    """What repflow must keep of CKA, absolute."""
    return {"cka_error": 1e-4 if case.dtype == torch.float32 else 2e-3}


def floor(case: Case, states: Tensor, product: Product) -> Timing:
    """Half the Gram products."""
    from _floors import half_the_grams

    return half_the_grams(case, product)


def calls(case: Case, states: Tensor, mask: Tensor | None) -> dict[str, Callable[[], object]]:
    """The implementations, the float64 reference first: HSIC `[B, S, S]`, or of the peers CKA `[S, S]` of all rows."""

    def repflow(implementation: Implementation) -> Tensor:
        with force(implementation):
            if use_triton(states) != (implementation == "triton"):
                raise RuntimeError(f"repflow does not take {implementation} for these states")
            return pairwise_hsic(states, mask)

    found: dict[str, Callable[[], object]] = {
        "reference": lambda: repflow("reference"),
        "eager, closed forms": lambda: closed_form(states),
    }
    if case.compiled:
        traced = compiled(closed_form, case, states.device)
        found["torch.compile"] = lambda: traced(states)
    found |= {**peer_calls(states), "repflow": lambda: repflow("triton")}
    if states.is_cuda:
        found["repflow, CUDA graph"] = graphed(found["repflow"])
    return found


def closed_form(states: Tensor) -> Tensor:
    """Unbiased HSIC of all pairs from the centred Grams of all states in float32, as `hsic_statistics` gives it."""
    x = states.transpose(0, 1).float()
    x = x - x.mean(2, keepdim=True)
    n = x.shape[2]
    gram = (x @ x.mT).flatten(2)
    square = x.square().sum(-1)
    total = square.sum(-1)
    product = total.unsqueeze(-1) * total.unsqueeze(-2) / ((n - 1) * (n - 2))
    return (gram @ gram.mT - n / (n - 2) * (square @ square.mT) + product) / (n * (n - 3))


def errors(got: Tensor, truth: Tensor) -> dict[str, float]:
    """The largest absolute error of CKA: per row, or of all rows together where `got` is that."""
    if got.ndim == 3:
        return {"cka_error": largest_error(cka_from_hsic(got.double()), cka_from_hsic(truth))}
    return {"cka_error": largest_error(got, cka_from_hsic(truth.sum(0)))}
