"""The warnings of repflow, and a way to warn that can never raise."""

import sys
import warnings


class RepflowWarning(RuntimeWarning):
    """Something could not be measured, stored or shown. Training is not affected."""


class AlertWarning(RepflowWarning):
    """A failure signature was seen in the representations: an `Alert`, in one line."""


def warn(message: str, category: type[RepflowWarning] = RepflowWarning, stacklevel: int = 2) -> None:
    """Warn, also where the user's filters turn warnings into exceptions: those must not reach the training loop."""
    try:
        warnings.warn(f"repflow: {message}", category, stacklevel=stacklevel + 1)
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
