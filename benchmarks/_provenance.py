"""Results as CSV: what was measured, and on what, with what and when."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("device", "driver", "torch", "triton", "python", "commit", "date")


def write_rows(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `rows` as CSV, each with the provenance of this run in `COLUMNS`, in place of what the file held.

    The other columns keep the order in which the rows first name them; a row without one of them leaves it empty.
    Floats are written with 5 significant digits, and None as nothing.

    Raises:
        ValueError: a row that names a column of the provenance itself.
    """
    origin = provenance()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if taken := sorted(set(columns) & set(origin)):
        raise ValueError(f"`write_rows`: expected rows without the columns that it adds, got {taken}; rename them")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *COLUMNS], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in {**row, **origin}.items()} for row in rows)


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a file that `write_rows` wrote."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def provenance() -> dict[str, str]:
    """Device, driver, versions of torch, triton and Python, commit, and date (UTC): nothing that names a machine."""
    import torch  # which `benchmarks/table.py`, that only reads, does without

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "driver": _driver() if torch.cuda.is_available() else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _text(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _run(*command: str) -> str | None:
    """What the command printed; None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _driver() -> str:
    printed = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return printed.splitlines()[0] if printed else "unknown"


def _commit() -> str:
    """What REPFLOW_COMMIT says, for a copy of the tree; or the commit, with "-dirty" if the tree differs from it."""
    if named := os.environ.get("REPFLOW_COMMIT"):
        return named
    commit = _run("git", "rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else None
    if commit is None:
        return "unknown"
    # Results of a benchmark that ran just before, and the table made from them, are not what is measured.
    made = (f":(exclude){path}" for path in ("benchmarks/results", "README.md", "docs/performance.md"))
    changed = _run("git", "status", "--porcelain", "--", ".", *made)
    return commit if changed == "" else f"{commit}-dirty"
