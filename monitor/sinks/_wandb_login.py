"""Whether the user is logged in to W&B, found out without asking the network or the user."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

_PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Names of the same service: a key for one of them does for both."""


def has_login(base_url: str) -> bool:
    """Whether the netrc file, where `wandb login` keeps keys, has one for the W&B server at `base_url`."""
    host = urlsplit(base_url).netloc
    try:
        logins = netrc.netrc(_netrc_file())
    except (OSError, netrc.NetrcParseError):  # none, or none that W&B could read either
        return False
    return any(logins.authenticators(name) for name in (_PUBLIC_HOSTS if host in _PUBLIC_HOSTS else (host,)))


def _netrc_file() -> Path:
    if given := os.environ.get("NETRC"):
        return Path(given).expanduser()
    usual = Path.home() / ".netrc"
    return usual if usual.exists() else Path.home() / "_netrc"
