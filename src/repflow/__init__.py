"""repflow: how a language model's token representations flow through depth while it trains.

The public names live in `repflow.monitor`, `repflow.callbacks` and `repflow.triton_kernels`; the most used are also
found here, imported on first use so that `import repflow` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from repflow.callbacks import RepresentationMonitor, RepresentationMonitorCallback
    from repflow.monitor import Monitor, MonitorConfig, Snapshot, find_residual_stream, open_run

_HOMES = {
    "Monitor": "repflow.monitor",
    "MonitorConfig": "repflow.monitor",
    "Snapshot": "repflow.monitor",
    "find_residual_stream": "repflow.monitor",
    "open_run": "repflow.monitor",
    "RepresentationMonitor": "repflow.callbacks",
    "RepresentationMonitorCallback": "repflow.callbacks",
}

__all__ = [
    "Monitor",
    "MonitorConfig",
    "RepresentationMonitor",
    "RepresentationMonitorCallback",
    "Snapshot",
    "__version__",
    "find_residual_stream",
    "open_run",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'repflow' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
