"""The paper's analyses on any checkpoint, offline: tasks, extraction, probes, and random initialisation.

What is measured, and with which estimators, is what the live monitor measures: the states go through the same taps,
kernels and sums. `tasks*` make the prompts, `loading` the models, `extraction` runs one on the other and keeps sums and
features, `probing` trains probes on these, and `initialisation` draws weights anew.
"""


class OfflineError(ValueError):
    """Something that was asked for cannot be done; the message says what was expected, what came, and what to do."""


class BeyondWindowError(OfflineError):
    """A context that is longer than what the model was made for: to be skipped, and said."""
