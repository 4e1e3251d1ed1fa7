"""What is measured, captured, stored, judged and shown.

Names are imported on first use, so that the command line starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repflow.monitor.alert import Alert
    from repflow.monitor.config import MonitorConfig
    from repflow.monitor.metrics import AdjacentLayerSimilarity, InterTokenSimilarity, LayerCKA, LayerVariation
    from repflow.monitor.monitor import Monitor
    from repflow.monitor.residual_stream import ResidualStream, find_residual_stream
    from repflow.monitor.signatures import Signature
    from repflow.monitor.sinks import open_run
    from repflow.monitor.snapshot import RunInfo, Snapshot
    from repflow.monitor.warning import AlertWarning, RepflowWarning

_HOMES = {
    "AdjacentLayerSimilarity": "metrics",
    "Alert": "alert",
    "AlertWarning": "warning",
    "InterTokenSimilarity": "metrics",
    "LayerCKA": "metrics",
    "LayerVariation": "metrics",
    "Monitor": "monitor",
    "MonitorConfig": "config",
    "RepflowWarning": "warning",
    "ResidualStream": "residual_stream",
    "RunInfo": "snapshot",
    "Signature": "signatures",
    "Snapshot": "snapshot",
    "find_residual_stream": "residual_stream",
    "open_run": "sinks",
}

__all__ = [
    "AdjacentLayerSimilarity",
    "Alert",
    "AlertWarning",
    "InterTokenSimilarity",
    "LayerCKA",
    "LayerVariation",
    "Monitor",
    "MonitorConfig",
    "RepflowWarning",
    "ResidualStream",
    "RunInfo",
    "Signature",
    "Snapshot",
    "find_residual_stream",
    "open_run",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
