"""What every sink is: told once what runs, given each snapshot, closed."""

from abc import ABC, abstractmethod

from repflow.monitor.snapshot import RunInfo, Snapshot


class AbstractSink(ABC):
    """Receives the snapshots of one run, on the training thread.

    A sink may raise: the monitor warns once, drops this sink, and training goes on. Slow work belongs in a thread of
    the sink's own; what it fails at there is raised by the next call.
    """

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Called once, before the first snapshot."""

    @abstractmethod
    def write(self, snapshot: Snapshot) -> None:
        """Called for each snapshot, in the order of its steps."""

    def flush(self) -> None:
        """Wait until everything written so far is where it belongs; nothing to do for a sink that writes at once."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Finish what is under way. May be called more than once, and without `start`."""
