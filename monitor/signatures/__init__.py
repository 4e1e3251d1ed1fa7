"""Failure signatures: named rules over snapshots, each raised once, with the layer, the numbers and what to do.

`DEFAULT` are those of a run unless `MonitorConfig.signatures` says otherwise; `docs/alerts.md` explains each.
"""

from repflow.monitor.signatures._base import Reading, Signature
from repflow.monitor.signatures.book import SignatureBook
from repflow.monitor.signatures.depth import DeadBlocks, RedundantLayers
from repflow.monitor.signatures.magnitude import DominantToken, MassiveActivations, NonFinite, NormExplosion
from repflow.monitor.signatures.probing import ProbingDrop, judge_probing
from repflow.monitor.signatures.similarity import CollapseOnset, EarlyOversmoothing, LateHomogenisation

DEFAULT: tuple[Signature, ...] = (
    NonFinite(),
    NormExplosion(),
    CollapseOnset(),
    EarlyOversmoothing(),
    LateHomogenisation(),
    DeadBlocks(),
    RedundantLayers(),
    MassiveActivations(),
    DominantToken(),
)
"""Every signature of a training run, as it is by default."""

__all__ = [
    "DEFAULT",
    "CollapseOnset",
    "DeadBlocks",
    "DominantToken",
    "EarlyOversmoothing",
    "LateHomogenisation",
    "MassiveActivations",
    "NonFinite",
    "NormExplosion",
    "ProbingDrop",
    "Reading",
    "RedundantLayers",
    "Signature",
    "SignatureBook",
    "judge_probing",
]
