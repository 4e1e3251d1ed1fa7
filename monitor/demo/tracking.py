"""The demo's W&B run: offline unless the user is logged in."""

import os
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from repflow._imports import WANDB
from repflow.monitor.sinks._wandb_login import has_login

_BASE_URL = "https://api.wandb.ai"


def wandb_mode() -> str:
    """`WANDB_MODE` where it is set, else `online` for a user who is logged in, else `offline`.

    Who has a key in the environment or in the netrc file is logged in; nothing is asked over the network.
    """
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    keyed = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    return "online" if keyed or has_login(os.environ.get("WANDB_BASE_URL") or _BASE_URL) else "offline"


def _unset_empty_variables() -> None:
    """To W&B an empty `WANDB_MODE` is a wrong one; to a shell's user it is none."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """A W&B run, or the reason why there is none."""

    logger: WandbLogger | None = None
    where: str
    """Address of an online run, folder of an offline one, or why there is none."""

    def finish(self, *, failed: bool) -> None:
        """Close the run: the next model starts one of its own."""
        if self.logger is not None:
            self.logger.experiment.finish(exit_code=int(failed))


def start_tracking(name: str, *, folder: Path) -> Tracking:
    """Start a W&B run in `folder`/wandb. Its own chatter is off: the demo says where the run is.

    A run that cannot be started is no reason not to train.
    """
    _unset_empty_variables()
    if not WANDB:
        return Tracking(where="none: wandb is not installed (pip install 'repflow[wandb]')")
    mode = wandb_mode()
    if mode == "disabled":
        return Tracking(where="none: WANDB_MODE=disabled")
    settings = {"silent": True, "console": "off", "disable_git": True}
    logger = WandbLogger(project="repflow-demo", name=name, save_dir=folder, mode=mode, settings=settings)
    try:
        # W&B speaks before it reads its settings, of arguments that Lightning passes; what goes wrong, it raises.
        with redirect_stderr(StringIO()):
            run = logger.experiment
    except Exception as error:
        return Tracking(where=f"none: {type(error).__name__}: {' '.join(str(error).split())}")
    return Tracking(logger=logger, where=(None if run.offline else run.url) or str(Path(run.dir).parent))
