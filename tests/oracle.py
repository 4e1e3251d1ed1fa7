"""The statistics straight from their definitions: loops over tokens, pairs and groups in float64, slow and obvious.

Nothing here shares a formula or a helper with repflow. States are arrays `h [S, B, T, D]`, a group is a list of
positions (row, token).
"""

import math
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Group = list[tuple[int, int]]


def upcast(states: Tensor) -> Array:
    """A copy in float64, which is exact from every dtype."""
    return states.detach().double().clone().numpy()


def token_groups(states: Tensor, mask: Tensor | None) -> list[Group]:
    """One group per row if the mask is boolean or has no value above 1, else one per document, in row-major order."""
    _, rows, tokens, _ = states.shape
    values = [[1] * tokens for _ in range(rows)] if mask is None else [[int(v) for v in row] for row in mask.tolist()]
    positions = [[(row, t) for t in range(tokens) if values[row][t] != 0] for row in range(rows)]
    if max((v for row in values for v in row), default=0) <= 1:
        return positions
    return [
        [(row, t) for row, t in positions[row] if values[row][t] == document]
        for row in range(rows)
        for document in sorted(set(values[row]) - {0})
    ]


def is_finite(vector: Array) -> bool:
    return bool(np.isfinite(vector).all())


def has_direction(vector: Array) -> bool:
    return is_finite(vector) and bool(vector.any())


def cosine(u: Array, v: Array) -> float:
    """NaN unless both have a direction. The largest entry is divided out first: no square over- or underflows."""
    if not (has_direction(u) and has_direction(v)):
        return math.nan
    u, v = u / np.abs(u).max(), v / np.abs(v).max()
    return float(np.sum(u * v) / (math.sqrt(np.sum(u * u)) * math.sqrt(np.sum(v * v))))


def _token_map(h: Array, layers: int) -> Array:
    return np.full((layers, *h.shape[1:3]), np.nan)


def norms(h: Array, groups: list[Group]) -> Array:
    out = _token_map(h, len(h))
    for row, t in chain(*groups):
        for layer in range(len(h)):
            x = h[layer, row, t]
            out[layer, row, t] = math.sqrt(np.sum(x * x)) if is_finite(x) else np.nan
    return out


def adjacent_cosine(h: Array, groups: list[Group]) -> Array:
    out = _token_map(h, len(h) - 1)
    for row, t in chain(*groups):
        for layer in range(len(h) - 1):
            out[layer, row, t] = cosine(h[layer, row, t], h[layer + 1, row, t])
    return out


def curvature(h: Array, groups: list[Group]) -> Array:
    """Mean over features of the absolute second difference, halved."""
    out = _token_map(h, max(len(h) - 2, 0))
    for row, t in chain(*groups):
        for layer in range(len(h) - 2):
            before, here, after = h[layer : layer + 3, row, t]
            if is_finite(before) and is_finite(here) and is_finite(after):
                out[layer, row, t] = np.mean(np.abs(here - (before + after) / 2))
    return out


def spread(h: Array, groups: list[Group]) -> Array:
    """Mean over features of the population standard deviation over the states."""
    out = np.full(h.shape[1:3], np.nan)
    for row, t in chain(*groups):
        if all(is_finite(x) for x in h[:, row, t]):
            out[row, t] = np.mean(np.std(h[:, row, t], axis=0))
    return out


def tokens_where(h: Array, groups: list[Group], condition) -> list[int]:
    """How many valid tokens of each state fulfil a condition."""
    return [sum(bool(condition(x[row, t])) for row, t in chain(*groups)) for x in h]


def updates(h: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.stack([h[layer + 1] - h[layer] for layer in range(len(h) - 1)]) if len(h) > 1 else h[:0]


def unit_sum(h: Array, groups: list[Group]) -> tuple[Array, NDArray[np.int64]]:
    """Sum of the unit vectors of each state and group, and how many there are."""
    sums = np.zeros((len(h), len(groups), h.shape[3]))
    counts = np.zeros((len(h), len(groups)), dtype=np.int64)
    for layer in range(len(h)):
        for g, group in enumerate(groups):
            for row, t in group:
                x = h[layer, row, t]
                if has_direction(x):
                    x = x / np.abs(x).max()
                    sums[layer, g] += x / math.sqrt(np.sum(x * x))
                    counts[layer, g] += 1
    return sums, counts


def inter_token(h: Array, groups: list[Group]) -> Array:
    """Mean cosine over every pair of tokens of a group, `[S, G]`."""
    out = np.full((len(h), len(groups)), np.nan)
    for layer in range(len(h)):
        for g, group in enumerate(groups):
            tokens = [h[layer, row, t] for row, t in group if has_direction(h[layer, row, t])]
            pairs = [cosine(u, v) for u, v in combinations(tokens, 2)]
            if pairs:
                out[layer, g] = math.fsum(pairs) / len(pairs)
    return out


def _alive(h: Array, group: Group) -> list[bool]:
    """Which states have a finite token in the group."""
    return [any(is_finite(x[row, t]) for row, t in group) for x in h]


def examples(h: Array, group: Group) -> Group:
    """The tokens of the group that are finite in every state, states without any finite token aside."""
    states = [x for x, alive in zip(h, _alive(h, group), strict=True) if alive]
    return [(row, t) for row, t in group if all(is_finite(x[row, t]) for x in states)] if states else []


def _gram(x: Array, group: Group) -> Array:
    tokens = np.array([x[position] for position in group])
    return tokens @ tokens.T


def biased_hsic(gram_a: Array, gram_b: Array) -> float:
    """tr(H K H · H L H)/(n − 1)², with the centring matrix H written out."""
    n = len(gram_a)
    centring = np.eye(n) - np.ones((n, n)) / n
    product = (centring @ gram_a @ centring) @ (centring @ gram_b @ centring)
    return float(np.trace(product) / (n - 1) ** 2)


def unbiased_hsic(gram_a: Array, gram_b: Array) -> float:
    """Song et al. 2012, Eq. 5, from uncentred Grams with their diagonals set to zero."""
    n, one = len(gram_a), np.ones(len(gram_a))
    a, b = (gram - np.diag(np.diag(gram)) for gram in (gram_a, gram_b))
    product = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
    return float((np.trace(a @ b) + product - 2 / (n - 2) * (one @ a @ b @ one)) / (n * (n - 3)))


def hsic(h: Array, groups: list[Group], estimator: str) -> tuple[Array, Array]:
    """HSIC `[G, S, S]`, and the size of the terms that cancel in it, to which float64 keeps some 16 digits."""
    least, definition = {"biased": (2, biased_hsic), "unbiased": (4, unbiased_hsic)}[estimator]
    out = np.full((len(groups), len(h), len(h)), np.nan)
    terms = out.copy()
    for g, group in enumerate(groups):
        used, alive = examples(h, group), _alive(h, group)
        grams = [_gram(x, used) if ok and len(used) >= least else None for x, ok in zip(h, alive, strict=True)]
        for a, gram_a in enumerate(grams):
            for b, gram_b in enumerate(grams):
                if gram_a is not None and gram_b is not None:
                    out[g, a, b] = definition(gram_a, gram_b)
                    size = np.linalg.norm(gram_a) * np.linalg.norm(gram_b)
                    terms[g, a, b] = size / max(len(used) * (len(used) - 3), 1)
    return out, terms


def cka_from_hsic(values: Array) -> Array:
    """CKA `[S, S]` of one matrix of HSIC values."""
    out = np.full(values.shape, np.nan)
    for a in range(len(values)):
        for b in range(len(values)):
            if values[a, a] > 0 and values[b, b] > 0:
                out[a, b] = values[a, b] / (math.sqrt(values[a, a]) * math.sqrt(values[b, b]))
    return out


def cka(h: Array, groups: list[Group], estimator: str) -> Array:
    """CKA `[G, S, S]`; NaN for a state whose tokens are all the same, which no rounding may hide."""
    values, _ = hsic(h, groups, estimator)
    out = np.stack([cka_from_hsic(matrix) for matrix in values]) if len(values) else values
    for g, group in enumerate(groups):
        used = examples(h, group)
        for layer, x in enumerate(h):
            if used and all((x[i] == x[used[0]]).all() for i in used):
                out[g, layer, :] = out[g, :, layer] = np.nan
    return out


def fourth_moments(h: Array, groups: list[Group]) -> Array:
    """‖x‖⁴ of every used token, centred over its group: sum and largest, `[2, G, S]`; 0 without a token."""
    out = np.zeros((2, len(groups), len(h)))
    for g, group in enumerate(groups):
        used = examples(h, group)
        for layer, (x, alive) in enumerate(zip(h, _alive(h, group), strict=True)):
            if used and alive:
                mean = sum(x[i] for i in used) / len(used)
                powers = [float(np.sum((x[i] - mean) ** 2)) ** 2 for i in used]
                out[:, g, layer] = sum(powers), max(powers)
    return out
