"""One background thread that works off a bounded queue, and reports its failures to the thread that fills it."""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event, Semaphore, Thread, current_thread
from typing import Generic, TypeVar
from weakref import WeakSet

Item = TypeVar("Item")


class Worker(Generic[Item]):
    """Runs `consume(items)` in a daemon thread, `items` being what is submitted, in order, until `close`.

    What `consume` raises is raised by the next call. The queue is drained at the exit of the process, too. A forked
    child has no such thread: there `submit` raises, and `flush` and `close` do nothing.

    Args:
        consume: What the thread runs. It should not refer to the owner of the worker, which could never be freed then.
        name: What the worker does, for error messages.
        capacity: Items that may wait; a full queue makes `submit` wait.
        patience: Seconds that a call waits at most.
    """

    def __init__(
        self,
        consume: Callable[[Iterator[Item]], None],
        *,
        name: str,
        capacity: int = 64,
        patience: float = 30.0,
    ) -> None:
        # SimpleQueue.put is reentrant: the garbage collector may call `stop` anywhere, even within this very queue.
        self._queue: SimpleQueue[Item | Event | None] = SimpleQueue()
        self._free = Semaphore(capacity)
        self._name = name
        self._patience = patience
        self._process = os.getpid()
        self._stopped = False
        self._failure: BaseException | None = None
        self._reported = False
        self._given_up = False
        self._thread = Thread(target=self._run, args=(consume,), name=f"repflow: {name}", daemon=True)
        self._thread.start()
        _workers.add(self)

    def submit(self, item: Item) -> None:
        """Queue `item`.

        Raises:
            RuntimeError: The worker was closed, or this is a fork of the process that started it.
            TimeoutError: The queue stayed full for `patience` seconds.
            BaseException: What the thread failed with, if it did.
        """
        if self._forked():
            raise RuntimeError(
                f"{self._name}: expected to be called in process {self._process}, which started it, but process "
                f"{os.getpid()}, forked from it, called; only one process may write: make a sink there of its own"
            )
        if self._failure is not None:
            self._reported = True
            raise self._failure
        if self._stopped:
            raise RuntimeError(f"{self._name}: already closed; call `start` again to open it anew")
        if not self._free.acquire(timeout=self._patience):
            raise TimeoutError(
                f"{self._name}: the queue has been full for {self._patience:g} s; does the device it writes to hang?"
            )
        self._queue.put(item)

    def flush(self) -> None:
        """Wait until everything queued is done.

        Raises:
            TimeoutError: It was not done after `patience` seconds.
            BaseException: What the thread failed with, unless it was raised before.
        """
        if self._forked() or self._stopped:
            return
        done = Event()
        self._queue.put(done)
        if not done.wait(self._patience):
            raise TimeoutError(f"{self._name}: not done after {self._patience:g} s; does the device it writes to hang?")
        self._raise_once()

    def stop(self) -> None:
        """Have the thread end after what is queued, without waiting for it."""
        if not self._forked() and not self._stopped:
            self._stopped = True
            self._queue.put(None)

    def close(self) -> None:
        """Stop, and wait until everything queued is done. May be called more than once.

        Raises:
            TimeoutError: It was not done after `patience` seconds; said once.
            BaseException: What the thread failed with, unless it was raised before.
        """
        if self._forked() or current_thread() is self._thread:
            return
        self.stop()
        if self._given_up:
            return
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._given_up = True
            raise TimeoutError(
                f"{self._name}: not done {self._patience:g} s after closing; what was queued last may be lost. "
                "Does the device it writes to hang?"
            )
        self._raise_once()

    def _raise_once(self) -> None:
        if self._failure is not None and not self._reported:
            self._reported = True
            raise self._failure

    def _forked(self) -> bool:
        return os.getpid() != self._process

    def _run(self, consume: Callable[[Iterator[Item]], None]) -> None:
        try:
            consume(self._items())
        except BaseException as error:  # whatever it is, the training thread must hear of it
            self._failure = error
            for _ in self._items():  # nobody waits for room in a queue that nothing empties
                pass

    def _items(self) -> Iterator[Item]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, Event):
                item.set()
                continue
            yield item
            del item  # not kept alive while waiting for the next
            self._free.release()


_workers: WeakSet[Worker] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Drain every queue before the interpreter ends, which would cut daemon threads off."""
    for worker in list(_workers):
        try:
            worker.close()
        except BaseException as error:
            print(f"repflow: {error}", file=sys.stderr)
