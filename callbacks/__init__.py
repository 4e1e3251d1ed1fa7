"""Thin shells over `repflow.monitor.Monitor` for training frameworks, imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repflow.callbacks.lightning import RepresentationMonitor
    from repflow.callbacks.regularizer import DualAscent, RepresentationRegularizer
    from repflow.callbacks.transformers import RepresentationMonitorCallback

_HOMES = {
    "DualAscent": "regularizer",
    "RepresentationMonitor": "lightning",
    "RepresentationMonitorCallback": "transformers",
    "RepresentationRegularizer": "regularizer",
}

__all__ = ["DualAscent", "RepresentationMonitor", "RepresentationMonitorCallback", "RepresentationRegularizer"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
