"""What tells a model or tokenizer from another one of the same name, in a folder or on the hub."""

from pathlib import Path
from typing import Any

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.loading import load_config
from repflow.monitor.offline.paper_models import PAPER_MODELS
from repflow.monitor.offline.reproduce.work import content_key


def source_key(name: str, revision: str | None = None, *, init: bool = False) -> list[Any]:
    """Of a folder the state of its files, of a name on the hub the commit that it stands for.

    Raises:
        OfflineError: there is no such model.
    """
    paper = name.lower() in PAPER_MODELS
    if paper and init:
        return []  # its configuration is not on the hub, but here
    if not paper and Path(name).exists():
        return content_key(name)
    return [getattr(load_config(hub_name(name), revision), "_commit_hash", None)]


def tokenizer_key(name: str) -> list[Any]:
    """The same of a tokenizer."""
    try:
        return source_key(name)
    except OfflineError:  # it may lie there by itself; whether it does is told when it is loaded
        return []


def hub_name(name: str) -> str:
    """The name under which the configuration of a checkpoint lies on the hub, not that which is kept here."""
    paper = PAPER_MODELS.get(name.lower())
    return paper.hub if paper else name
