"""Imports point one way: callbacks -> monitor -> triton_kernels -> torch, and inside the monitor from tier to tier."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "repflow"
FILES = sorted(
    str(file.relative_to(PACKAGE))
    for folder in ("callbacks", "monitor", "triton_kernels")
    for file in (PACKAGE / folder).rglob("*.py")
)

# A unit is a module or folder of the monitor. It may import the units of its own tier and of those above it here.
TIERS = (
    {
        *("alert", "config", "functional", "residual_stream", "sampling", "signatures", "snapshot"),
        *("sum_layout", "warning", "weakly"),
        *("parts", "readers", "wrappers"),  # what residual_stream knows of architectures
    },
    {
        *("accumulator", "block_state", "buffer", "capture", "captured", "chain", "delivery", "drift"),
        *("injection", "masks", "metrics", "notices", "positions", "probe", "ranks", "regularizer_checks", "run_info"),
        *("sequence_shards", "ssm", "strength", "taps", "term", "token_choice", "trained_forwards"),
    },
    {"sinks"},
    {"publication"},
    {"monitor"},
    {"regularizer"},
    {"demo", "inspection", "offline", "report", "theory"},
    {"cli"},
)
# `repflow.monitor` itself gathers the public names of the units up to the monitor, for those above it and outside.
ENGINE = {"monitor"}
GATHERED = ("Monitor", "MonitorConfig", "ResidualStream", "Snapshot", "find_residual_stream", "open_run")
# Units that know less than their tier: a sink is given snapshots, and the report reads run files only.
KNOWS_ONLY = {
    "sinks": ("monitor.sinks", "monitor.alert", "monitor.snapshot", "monitor.sum_layout", "monitor.warning"),
    "report": ("monitor.report", "monitor.snapshot", "monitor.sinks.open_run"),
}
# What anything but the kernels may know: of the distribution itself, and how to warn.
COMMON = ("__version__", "_imports", "monitor.warning")
# The one exception: the demo is a user of its own library.
DEMO_KNOWS = ("callbacks", "lightning")

KERNELS_KNOW = {"torch", "triton", "jaxtyping", "repflow"} | sys.stdlib_module_names


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted target of every import, at any depth: `from a import b` gives `a.b`, as does `import_module`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def starts(target: str, *prefixes: str) -> bool:
    """Whether a dotted name is one of the prefixes or lies under one."""
    return any(target == prefix or target.startswith(f"{prefix}.") for prefix in prefixes)


def unit_of(file: str) -> str | None:
    """The unit of the monitor that a file belongs to; None for the facade and for files elsewhere."""
    parts = Path(file).with_suffix("").parts
    return parts[1] if parts[0] == "monitor" and parts[1] != "__init__" else None


def known(file: str) -> tuple[str, ...]:
    """Prefixes below `repflow` that a file may import."""
    folder, unit = Path(file).parts[0], unit_of(file)
    if folder == "triton_kernels":
        return ("triton_kernels",)
    if folder == "callbacks":
        return ("callbacks", "monitor", *COMMON)
    if unit in KNOWS_ONLY:
        return (*KNOWS_ONLY[unit], *COMMON)
    engine = TIERS.index(ENGINE)
    tier = engine if unit is None else next((level for level, units in enumerate(TIERS) if unit in units), None)
    assert tier is not None, f"{file}: place the unit {unit!r} in TIERS of {Path(__file__).name}"
    names = sorted(set().union(*TIERS[: tier + 1])) + list(GATHERED if tier > engine else ())
    return ("triton_kernels", *(f"monitor.{name}" for name in names), *COMMON)


def allowed(file: str, target: str) -> bool:
    """Whether a file may import a target."""
    folder, unit = Path(file).parts[0], unit_of(file)
    if unit == "demo" and starts(target.removeprefix("repflow."), *DEMO_KNOWS):
        return True
    if folder == "triton_kernels" and target.split(".")[0] not in KERNELS_KNOW:
        return False
    if target == "repflow":
        return folder != "triton_kernels"  # for its version
    if starts(target, "repflow"):
        return starts(target.removeprefix("repflow."), *known(file))
    if starts(target, "monitor", "callbacks", "triton_kernels"):
        return False  # the folders have no name of their own
    if starts(target, "lightning", "pytorch_lightning") or target.startswith("transformers.Train"):
        return folder == "callbacks"
    if starts(target, "transformers.trainer", "transformers.trainer_callback", "transformers.trainer_utils"):
        return folder == "callbacks"
    if starts(target, "wandb", "wandb_workspaces"):
        return unit == "sinks"
    return folder == "triton_kernels" or not starts(target, "triton")


def violations(file: str, source: str) -> list[str]:
    """The imports of a file that it may not have, each with its line."""
    package = ".".join(("repflow", *Path(file).parent.parts))
    found = imports(source, package)
    return [f"{file}:{line} imports {target}" for line, target in found if not allowed(file, target)]


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file: str):
    assert not violations(file, (PACKAGE / file).read_text())


def test_wandb_is_imported_in_one_file():
    users = [
        file
        for file in FILES
        if any(starts(target, "wandb") for _, target in imports((PACKAGE / file).read_text(), "repflow"))
    ]
    assert len(users) <= 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("triton_kernels/depth.py", "from repflow.monitor import snapshot"),
        ("triton_kernels/depth.py", "import transformers"),
        ("triton_kernels/depth.py", "import repflow"),
        ("monitor/monitor.py", "def later():\n    from repflow.callbacks import lightning"),
        ("monitor/monitor.py", "from ..callbacks import lightning"),
        ("monitor/monitor.py", "import triton"),
        ("monitor/monitor.py", "import monitor.snapshot"),
        ("monitor/capture.py", "import lightning.pytorch as pl"),
        ("monitor/capture.py", "from transformers import TrainerCallback"),
        ("monitor/capture.py", "from repflow.monitor.monitor import Monitor"),
        ("monitor/capture.py", "from repflow.monitor import Monitor"),
        ("monitor/sampling.py", "from . import capture"),
        ("monitor/__init__.py", "from repflow.monitor import cli"),
        ("monitor/sinks/wandb.py", "from repflow.monitor.functional import layer_cka"),
        ("monitor/report/page.py", "from repflow.monitor.sinks import RunFileSink"),
        ("monitor/report/page.py", "importlib.import_module('wandb')"),
        ("monitor/demo/train.py", "import wandb"),
        ("callbacks/lightning.py", "from repflow.triton_kernels import depth_statistics"),
    ],
)
def test_the_wrong_way_is_seen(file: str, source: str):
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("triton_kernels/depth.py", "import triton.language as tl\nfrom repflow.triton_kernels import reference"),
        ("monitor/capture.py", "from .sampling import sample\nimport transformers"),
        ("monitor/report/page.py", "from repflow.monitor.sinks import open_run\nfrom repflow._imports import require"),
        ("monitor/demo/train.py", "import lightning as L\nfrom repflow.callbacks import RepresentationMonitor"),
        ("monitor/monitor.py", "import repflow"),
        ("monitor/cli.py", "from repflow.monitor.demo import run\nimport lightning_utilities"),
        ("monitor/cli.py", "from repflow.monitor import MonitorConfig, find_residual_stream"),
        ("monitor/__init__.py", "from repflow.monitor.sinks import open_run"),
        ("callbacks/lightning.py", "from lightning.pytorch import Callback\nfrom repflow.monitor import Monitor"),
    ],
)
def test_the_right_way_passes(file: str, source: str):
    assert not violations(file, source)
