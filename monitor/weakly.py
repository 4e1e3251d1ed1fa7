"""Callbacks that do not hold their owner, so that a monitor that is dropped gives its memory back at once."""

import weakref
from collections.abc import Callable
from typing import Any


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive, and does nothing once that is gone.

    Parts of the monitor call their owner. Held as such, the owner would be in a cycle with them, and only the garbage
    collector, which may come an hour later, would free it, the buffer on the GPU, and the model.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        found = reference()
        return None if found is None else found(*args, **kwargs)

    return call
