"""Which optional packages are here: one flag for each, evaluated on first use, and the error for a missing one."""

from importlib import metadata
from typing import Literal

from lightning_utilities.core.imports import RequirementCache

LIGHTNING = RequirementCache("lightning>=2.5")
PYTORCH_LIGHTNING = RequirementCache("pytorch-lightning>=2.5")  # the same framework under its other import name
TRANSFORMERS = RequirementCache("transformers>=5")
ACCELERATE = RequirementCache("accelerate>=1.1")
WANDB = RequirementCache("wandb>=0.20")
WANDB_WORKSPACES = RequirementCache("wandb-workspaces>=0.4.13", "wandb_workspaces")
PLOTLY = RequirementCache("plotly>=6")
MATPLOTLIB = RequirementCache("matplotlib>=3.9")
PILLOW = RequirementCache("pillow>=11")

_EXTRAS = {
    "lightning": ("lightning", (LIGHTNING, PYTORCH_LIGHTNING)),
    "transformers": ("transformers", (TRANSFORMERS,)),
    "accelerate": ("offline", (ACCELERATE,)),
    "wandb": ("wandb", (WANDB,)),
    "wandb_workspaces": ("wandb", (WANDB_WORKSPACES,)),
    "plotly": ("report", (PLOTLY,)),
    "matplotlib": ("offline", (MATPLOTLIB,)),
    "pillow": ("wandb", (PILLOW,)),
}


def require(
    package: Literal[
        "lightning", "transformers", "accelerate", "wandb", "wandb_workspaces", "plotly", "matplotlib", "pillow"
    ],
) -> None:
    """Check that an optional package can be imported; for Lightning, under either of its names.

    Raises:
        ModuleNotFoundError: The package is missing or too old; the text names the extra that installs it.
    """
    extra, alternatives = _EXTRAS[package]
    if not any(alternatives):
        expected = " or ".join(str(flag.requirement) for flag in alternatives)
        raise ModuleNotFoundError(
            f"repflow needs {expected} for this, but {_found(package)}; install it: pip install 'repflow[{extra}]'",
            name=package,
        )


def _found(package: str) -> str:
    """What is installed under the name `package`, in words."""
    try:
        return f"{package} {metadata.version(package)} is installed"
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
