"""The warnings of repflow, and a way to warn that can never raise."""

import sys
import warnings

_INSIDE = ("repflow", "contextlib", "jaxtyping", "beartype")
"""Packages whose lines tell nothing: also of what enters `with` blocks, and of what checks shapes in tests."""


class RepflowWarning(RuntimeWarning):
    """Something could not be measured, stored or shown. Training is not affected."""


class AlertWarning(RepflowWarning):
    """A failure signature was seen in the representations: an `Alert`, in one line."""


def warn(message: str, category: type[RepflowWarning] = RepflowWarning) -> None:
    """Warn, also where the user's filters turn warnings into exceptions: those must not reach the training loop.

    The line that is shown with it is the first one outside of repflow, in the training loop: none of repflow's own
    tells anything.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    try:
        warnings.warn(f"repflow: {message}", category, stacklevel=level)
    except RepflowWarning as warning:
        print(f"{type(warning).__name__}: {warning}", file=sys.stderr)


class WarnOnce:
    """Warns once about each thing."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: str, key: str | None = None) -> None:
        """Warn, unless that was done under this `key`: the message itself if None."""
        if (key or message) not in self._said:
            self._said.add(key or message)
            warn(message)
