"""The sink for a run whose snapshots go nowhere."""

from repflow.monitor.sinks._base import AbstractSink
from repflow.monitor.snapshot import RunInfo, Snapshot


class NullSink(AbstractSink):
    """Keeps nothing."""

    def start(self, run: RunInfo) -> None:
        """Nothing to do."""

    def write(self, snapshot: Snapshot) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""
