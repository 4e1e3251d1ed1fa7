"""What the paper says of models drawn at random, held against what was measured, choice by choice."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from repflow.monitor.offline.reproduce.written import Row

Curve = list[float | None]
Choice = tuple[str, str, str, float]
"""Scheme, policy, norms, scale of the embedding."""

HIGH, FEW, NEAR = 0.8, 0.25, 0.1
"""Similarity that is called high; share of the depth that is called few layers; distance from 0 that is called near."""
HALF = 0.5


@dataclass(frozen=True, eq=False)
class Curves:
    """Mean over seeds of every model and choice."""

    values: Mapping[tuple[str, Choice], Curve]
    families: Mapping[str, str]

    def choices(self) -> list[Choice]:
        """All of them, in the order of the rows."""
        return list(dict.fromkeys(choice for _, choice in self.values))

    def models(self, family: str) -> list[str]:
        """Those of a family."""
        return [model for model, found in self.families.items() if found == family]


def curves_of(rows: Sequence[Row]) -> Curves:
    """Mean curves out of rows; None where a seed has no value."""
    seeds: dict[tuple[str, Choice], dict[int, Curve]] = defaultdict(lambda: defaultdict(list))
    families: dict[str, str] = {}
    for row in rows:
        choice = (row["scheme"], row["policy"], row["norms"], row["embedding_scale"])
        seeds[row["model"], choice][row["seed"]].append(row["value"])
        families[row["model"]] = row["family"]
    return Curves({key: _mean(list(curves.values())) for key, curves in seeds.items()}, families)


def claims_of(target: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each claim about a figure, with a verdict for every choice: true, false, or None where it cannot be told."""
    curves = curves_of(rows)
    return [claim(curves) for claim in _CLAIMS.get(target, ())]


def unclaimed(target: str, rows: Sequence[Row]) -> list[str]:
    """Models that no claim about a figure is held against, for the paper has none of their kind."""
    if target not in _CLAIMS:
        return []
    return [
        f"{model} ({family}): no claim is held against it: the paper's are about models of attention alone (TBM) and "
        "of state-space blocks alone (SSM)"
        for model, family in curves_of(rows).families.items()
        if family not in ("TBM", "SSM")
    ]


def _rises(curves: Curves) -> dict[str, Any]:
    def verdict(curve: Curve) -> tuple[bool | None, float | None]:
        later = curve[_few(curve) :]
        return _holds(later, lambda values: min(values), lambda lowest: lowest >= HIGH)

    text = f"Transformers rise to {HIGH} within the first quarter of their layers and stay above it"
    return _by_model(curves, "TBM", text, "§3.2.3: ~80–100 % within the first few layers, saturated after", verdict)


def _stays(curves: Curves) -> dict[str, Any]:
    def verdict(curve: Curve) -> tuple[bool | None, float | None]:
        return _holds(curve, lambda values: max(values, key=abs), lambda farthest: abs(farthest) <= NEAR)

    return _by_model(
        curves, "SSM", f"State-space models stay within {NEAR} of 0 at every state", "§3.2.3: near zero", verdict
    )


def _ordered(curves: Curves) -> dict[str, Any]:
    """The smallest transformer against the largest state-space model, each by its mean over depth."""
    text = "Every transformer lies above every state-space model, by the mean over depth"
    verdicts = []
    for choice in curves.choices():
        sides = [[_depth_mean(curves.values.get((model, choice), [])) for model in curves.models(family)]
                 for family in ("TBM", "SSM")]  # fmt: skip
        low, high = ([mean for mean in side if mean is not None] for side in sides)
        told = bool(low and high) and all(mean is not None for side in sides for mean in side)
        gap = min(low) - max(high) if told else None
        verdicts.append(_verdict(choice, None, None if gap is None else gap > 0, gap))
    return {"claim": text, "paper": "§3.2.3 and appendix C", "value": "difference", "verdicts": verdicts}


def _collapses(curves: Curves) -> dict[str, Any]:
    text = "Without its norms a transformer keeps at most half of its similarity, by the mean over depth"
    return _against_baseline(curves, text, "appendix C: a dramatic collapse", "disabled", _is_half)


def _intermediate(curves: Curves) -> dict[str, Any]:
    text = "With norm affines at 1 and 0 a transformer lies between those with norms as they are and without"
    return _against_baseline(curves, text, "appendix C: intermediate behaviour", "affine_reset", _is_between)


def _is_half(reset: float, disabled: float, baseline: float) -> bool:
    return disabled <= HALF * baseline


def _is_between(reset: float, disabled: float, baseline: float) -> bool:
    return min(disabled, baseline) < reset < max(disabled, baseline)


def _against_baseline(
    curves: Curves, text: str, paper: str, shown: str, holds: Callable[[float, float, float], bool]
) -> dict[str, Any]:
    verdicts = []
    for scheme, policy in dict.fromkeys((choice[0], choice[1]) for choice in curves.choices()):
        for model in curves.models("TBM"):
            means = {
                norms: _depth_mean(curves.values.get((model, (scheme, policy, norms, 1.0)), []))
                for norms in ("affine_reset", "disabled", "baseline")
            }
            known = [mean for mean in means.values() if mean is not None]
            verdict = holds(*known) if len(known) == len(means) else None
            verdicts.append(_verdict((scheme, policy, shown, 1.0), model, verdict, means[shown]))
    return {"claim": text, "paper": paper, "value": "mean over depth", "verdicts": verdicts}


def _by_model(
    curves: Curves, family: str, text: str, paper: str, verdict: Callable[[Curve], tuple[bool | None, float | None]]
) -> dict[str, Any]:
    verdicts = [
        _verdict(choice, model, *verdict(curves.values[model, choice]))
        for choice in curves.choices()
        for model in curves.models(family)
        if (model, choice) in curves.values
    ]
    return {"claim": text, "paper": paper, "value": "the value that decides", "verdicts": verdicts}


def _holds(
    curve: Curve, pick: Callable[[list[float]], float], holds: Callable[[float], bool]
) -> tuple[bool | None, float | None]:
    """Whether the value that decides will do. Where a state has none, it can only be told that it will not."""
    known = _known(curve)
    if not known:
        return None, None
    value = pick(known)
    return (None if holds(value) and len(known) < len(curve) else holds(value)), value


def _verdict(choice: Choice, model: str | None, holds: bool | None, value: float | None) -> dict[str, Any]:
    scheme, policy, norms, scale = choice
    told = {"scheme": scheme, "policy": policy, "norms": norms, "embedding_scale": scale}
    return told | ({"model": model} if model else {}) | {"holds": holds, "value": value}


def _mean(curves: Sequence[Curve]) -> Curve:
    means: Curve = []
    for values in zip(*curves, strict=True):
        known = _known(values)
        means.append(fmean(known) if len(known) == len(values) else None)
    return means


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _depth_mean(curve: Curve) -> float | None:
    """None if a state has no value: then what is there need not be like the rest."""
    known = _known(curve)
    return fmean(known) if known and len(known) == len(curve) else None


def _few(curve: Curve) -> int:
    return max(1, round(FEW * (len(curve) - 1)))


_CLAIMS: dict[str, tuple[Callable[[Curves], dict[str, Any]], ...]] = {
    "figure3": (_rises, _stays, _ordered),
    "figure5": (_ordered,),
    "figure6": (_collapses, _intermediate, _ordered),
    "figure7": (_ordered,),
}
