"""What tells a model or tokenizer from another one of the same name, in a folder or on the hub."""

from pathlib import Path
from typing import Any

from repflow.monitor.offline.loading import commit_of, hub_name, load_config
from repflow.monitor.offline.paper_models import PAPER_MODELS
from repflow.monitor.offline.reproduce.work import content_key


def model_source(name: str, revision: str | None = None, *, init: bool = False) -> list[Any]:
    """Of a folder the state of its files, of a name on the hub the commit that it stands for.

    Raises:
        OfflineError: there is no such model.
    """
    if name.lower() in PAPER_MODELS and init:
        return []  # its configuration is not on the hub, but here
    if _local(name):
        return content_key(name)
    load_config(hub_name(name), revision)
    return [commit_of(name, revision)]


def tokenizer_source(name: str) -> list[Any]:
    """The same of a tokenizer."""
    return content_key(name) if _local(name) else [commit_of(name, file="tokenizer_config.json")]


def commit_in(source: list[Any]) -> str | None:
    """The commit of a model of the hub; None for others."""
    return next((part for part in source if isinstance(part, str)), None)


def _local(name: str) -> bool:
    return name.lower() not in PAPER_MODELS and Path(name).exists()
