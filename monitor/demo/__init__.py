"""`repflow demo`: three little language models trained one after another under the monitor.

A user of the library like any other, on top of everything else; it needs Lightning, transformers and plotly. Lightning
is imported by `language_model`, `progress`, `tracking` and `training`, which `run` imports when a demo starts.
"""


class DemoError(ValueError):
    """An option or a text that no demo can be made of; the message says why and what would do."""
