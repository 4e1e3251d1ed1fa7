import threading
import time
import weakref

import pytest

from repflow.monitor.sinks._worker import Worker


def test_items_are_worked_off_in_order():
    done: list[int] = []
    worker: Worker[int] = Worker(done.extend, name="list", capacity=3)
    for number in range(100):
        worker.submit(number)
    worker.flush()
    assert done == list(range(100))
    worker.close()
    worker.close()
    worker.flush()
    with pytest.raises(RuntimeError, match="already closed"):
        worker.submit(1)


def test_a_failure_is_raised_by_the_next_calls_and_never_blocks():
    def fail(items):
        for _ in items:
            raise OSError("no space")

    worker: Worker[int] = Worker(fail, name="failing", capacity=2)
    worker.submit(0)
    with pytest.raises(OSError, match="no space"):
        worker.flush()
    for _ in range(5):  # more than fit into the queue
        with pytest.raises(OSError, match="no space"):
            worker.submit(1)
    worker.close()  # has been said


def test_a_failure_that_nothing_has_said_is_raised_by_close_once():
    def fail(items):
        raise OSError(f"no space, {next(items)}")

    worker: Worker[int] = Worker(fail, name="failing")
    worker.submit(0)
    with pytest.raises(OSError, match="no space, 0"):
        worker.close()
    worker.close()


def test_a_hanging_device_holds_nobody_up_for_ever():
    release = threading.Event()

    def hang(items):
        for _ in items:
            release.wait()

    worker: Worker[int] = Worker(hang, name="hung", capacity=1, patience=0.1)
    worker.submit(0)
    with pytest.raises(TimeoutError, match=r"hung: the queue has been full for 0.1 s"):
        worker.submit(1)
    with pytest.raises(TimeoutError, match=r"not done after 0.1 s"):
        worker.flush()
    with pytest.raises(TimeoutError, match=r"not done 0.1 s after closing"):
        worker.close()
    begun = time.monotonic()
    worker.close()
    assert time.monotonic() - begun < 0.1
    release.set()


def test_the_last_item_is_not_kept_alive():
    class Big:
        pass

    worker: Worker[Big] = Worker(_drop, name="drop")
    item = Big()
    alive = weakref.ref(item)
    worker.submit(item)
    del item
    deadline = time.monotonic() + 10
    while alive() is not None and time.monotonic() < deadline:  # `flush` would put another item in its place
        time.sleep(0.01)
    assert alive() is None
    worker.close()


def _drop(items):
    for item in items:
        del item
