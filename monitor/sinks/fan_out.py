"""Several sinks as one."""

from collections.abc import Callable, Iterable
from contextlib import suppress

from repflow.monitor.sinks._base import AbstractSink
from repflow.monitor.snapshot import RunInfo, Snapshot
from repflow.monitor.warning import warn


class FanOutSink(AbstractSink):
    """Hands everything to each of several sinks, in order.

    A sink that raises is dropped and closed, with one warning; the others go on. The next `start` tries it again.

    Args:
        sinks: Where everything goes.

    Raises:
        TypeError: One of them is no sink, or one alone.
    """

    def __init__(self, sinks: Iterable[AbstractSink]) -> None:
        if isinstance(sinks, AbstractSink):
            raise TypeError(
                f"`FanOutSink`: expected a list of sinks, got {type(sinks).__name__}; write [{type(sinks).__name__}()]"
            )
        self._all = tuple(sinks)
        for sink in self._all:
            if not isinstance(sink, AbstractSink):
                raise TypeError(
                    f"`FanOutSink`: expected sinks such as RunFileSink(), got {sink!r}; pass objects, no classes"
                )
        self._live = list(self._all)

    @property
    def sinks(self) -> tuple[AbstractSink, ...]:
        """Those that have not failed."""
        return tuple(self._live)

    def start(self, run: RunInfo) -> None:
        """Start each."""
        self._live = list(self._all)
        self._each(lambda sink: sink.start(run))

    def write(self, snapshot: Snapshot) -> None:
        """Write to each."""
        self._each(lambda sink: sink.write(snapshot))

    def flush(self) -> None:
        """Flush each."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Close each."""
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[AbstractSink], None]) -> None:
        failed: list[tuple[AbstractSink, Exception]] = []
        for sink in self.sinks:
            try:
                call(sink)
            except Exception as error:
                self._live.remove(sink)
                with suppress(Exception):  # what it failed at has been said
                    sink.close()
                failed.append((sink, error))
        for sink, error in failed:
            warn(
                f"{type(sink).__name__} failed and gets nothing more of this run; training and "
                f"{len(self._live)} other sinks go on. To have it back, mend the cause and start the run again. "
                f"{type(error).__name__}: {error}"
            )
