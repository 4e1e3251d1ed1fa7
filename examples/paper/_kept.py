"""Whether a model that lies in the work folder is the one that is asked for now."""

import json
from pathlib import Path
from typing import Any


def is_there(file: Path, asked: dict[str, Any]) -> bool:
    """Whether a model is there already; one that was made with other choices is never taken for it.

    Args:
        file: what is written last of a model, with its `choices`; those that it does not name are not compared.
        asked: the choices of now, as plain values.

    Raises:
        SystemExit: another one is there, and lest its work be lost it is not trained over.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["choices"]
    except (OSError, ValueError, KeyError):  # not there, or cut short
        return False
    differing = [name for name, value in asked.items() if name in found and found[name] != value]
    if differing:
        told = ", ".join(f"--{name.replace('_', '-')} {found[name]}, not {asked[name]}" for name in differing)
        raise SystemExit(
            f"{file.parent}: expected a model of the options of now, found one made with {told}; remove this folder to "
            "train it again, or name another --work"
        )
    return True
