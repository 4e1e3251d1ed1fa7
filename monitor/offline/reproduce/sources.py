"""What tells a model or tokenizer from another one of the same name, in a folder or on the hub."""

from pathlib import Path
from typing import Any

from repflow.monitor.offline.loading import load_config
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
    return [_commit(hub_name(name), "config.json", revision)]


def tokenizer_source(name: str) -> list[Any]:
    """The same of a tokenizer."""
    if _local(name):
        return content_key(name)
    try:
        return [_commit(hub_name(name), "tokenizer_config.json", None)]
    except OSError:  # whether there is one all the same is told when it is loaded
        return []


def commit_in(source: list[Any]) -> str | None:
    """The commit of a model of the hub; None for others."""
    return next((part for part in source if isinstance(part, str)), None)


def hub_name(name: str) -> str:
    """The name under which the configuration of a checkpoint lies on the hub, not that which is kept here."""
    paper = PAPER_MODELS.get(name.lower())
    return paper.hub if paper else name


def _local(name: str) -> bool:
    return name.lower() not in PAPER_MODELS and Path(name).exists()


def _commit(name: str, file: str, revision: str | None) -> str:
    """Files of the hub are kept in a folder for each commit, and configurations of transformers no longer tell it."""
    from transformers.utils.hub import cached_file

    found = cached_file(name, file, revision=revision)
    assert found is not None  # it raises where there is none
    return Path(found).parent.name
