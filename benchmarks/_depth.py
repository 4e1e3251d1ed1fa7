"""Statistics along depth and across tokens: what is compared, and how far each is from float64."""

import math
from collections.abc import Callable

import torch
from _cases import Case
from _measure import Product, Timing, compiled, graphed, largest_error
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from repflow.monitor.functional.inter_token import mean_pair_cosine
from repflow.triton_kernels import depth_and_token_sums
from repflow.triton_kernels._dispatch import Implementation, force, use_triton

QUANTITY = "depth and token sums"

_COSINES = ("adjacent_cosine", "adjacent_distance", "inter_token", "update_inter_token")
_SCALES = ("norm", "curvature", "spread", "v_loc", "v_glob")
_COUNTS = ("nonfinite", "zero", "count", "update_count")


def tolerances(case: Case) -> dict[str, float]:
    """What repflow must keep: cosines absolute, variation and norms relative, whatever the dtype of the states."""
    return {"cosine_error": 1e-5, "v_error": 1e-5}


def floor(case: Case, states: Tensor, product: Product) -> Timing:
    """One read of the states."""
    from _floors import read_once

    return read_once(states)


def calls(case: Case, states: Tensor, mask: Tensor | None) -> dict[str, Callable[[], object]]:
    """The implementations, the float64 reference first. What is written in PyTorch here knows no mask."""

    def repflow(implementation: Implementation) -> tuple[object, ...]:
        with force(implementation):
            if use_triton(states) != (implementation == "triton"):
                raise RuntimeError(f"repflow does not take {implementation} for these states")
            return depth_and_token_sums(states, mask)

    found: dict[str, Callable[[], object]] = {"reference": lambda: repflow("reference")}
    if mask is None:
        found["eager, obvious"] = lambda: obvious(states)
        found["eager, closed forms"] = lambda: closed_forms(states)
    if case.compiled:
        traced = compiled(closed_forms, case, states.device)
        found["torch.compile"] = lambda: traced(states)
    found |= {"repflow": lambda: repflow("triton")}
    if states.is_cuda:
        found["repflow, CUDA graph"] = graphed(found["repflow"])
    return found


def obvious(states: Tensor) -> dict[str, Tensor]:
    """The four published quantities as one writes them down first, in float32: cosines of all pairs of tokens."""
    x = states.float()
    unit = normalize(x, dim=-1)
    cosine = unit @ unit.mT
    tokens = states.shape[2]
    pairs = cosine.sum((-2, -1)) - cosine.diagonal(dim1=-2, dim2=-1).sum(-1)
    return {
        "adjacent_cosine": cosine_similarity(x[1:], x[:-1], dim=-1),
        "inter_token": pairs / (tokens * (tokens - 1)),
        "v_loc": (x[1:-1] - (x[:-2] + x[2:]) / 2).abs().mean(),
        "v_glob": x.std(0, correction=0).mean(),
    }


def closed_forms(states: Tensor) -> dict[str, Tensor]:
    """The same without pairs: the mean cosine over pairs is (‖Σ_t u_t‖² − n)/(n(n − 1)) of the unit vectors u."""
    x = states.float()
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    tokens = states.shape[2]
    return {
        "adjacent_cosine": (unit[1:] * unit[:-1]).sum(-1),
        "inter_token": (unit.sum(2).square().sum(-1) - tokens) / (tokens * (tokens - 1)),
        "v_loc": (x[1:-1] - (x[:-2] + x[2:]) / 2).abs().mean(),
        "v_glob": x.std(0, correction=0).mean(),
    }


def errors(got, truth) -> dict[str, float]:
    """The largest error of a cosine, absolute, and of a V or a norm, relative; both infinite if a count differs."""
    found, want = _quantities(got), _quantities(truth)
    if any(not torch.equal(found[name], want[name]) for name in _COUNTS if name in found):
        return {"cosine_error": math.inf, "v_error": math.inf}
    return {
        "cosine_error": max(largest_error(found[name], want[name]) for name in _COSINES if name in found),
        "v_error": max(largest_error(found[name], want[name], relative=True) for name in _SCALES if name in found),
    }


def _quantities(result) -> dict[str, Tensor]:
    if isinstance(result, dict):
        return result
    depth, sums = result
    return {
        **depth._asdict(),
        **sums._asdict(),
        "inter_token": mean_pair_cosine(torch.linalg.vector_norm(sums.unit_sum, dim=-1), sums.count),
        "update_inter_token": mean_pair_cosine(
            torch.linalg.vector_norm(sums.update_unit_sum, dim=-1), sums.update_count
        ),
        "v_loc": depth.curvature.double().nanmean(),
        "v_glob": depth.spread.double().nanmean(),
    }
