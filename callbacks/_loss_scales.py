"""What trainers multiply a loss with before backward: the regularizer's term has to follow."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OWNER = "RepresentationRegularizer"


def lightning_scale(trainer: Any, module: Any) -> Callable[[torch.device], Tensor | float] | None:
    """Of a Lightning Trainer: one part of `accumulate_grad_batches`, times the scaler of its precision.

    None in manual optimization, where the module divides the loss itself: it has to be followed.

    Raises:
        ValueError: a strategy that scales the loss, or spreads tokens, out of sight.
    """
    name = type(trainer.strategy).__name__
    if "ModelParallel" in name:  # FSDP2, with tensor parallelism or without
        if (size := getattr(trainer.strategy, "_tensor_parallel_size", 1)) not in (1, None):
            raise ValueError(
                f"`{_OWNER}`: expected whole sequences and states on each rank, got {name} with tensor_parallel_size="
                f"{size}; pass tensor_parallel_size=1"
            )
    elif "DeepSpeed" in name or "XLA" in name:
        raise ValueError(f"`{_OWNER}`: expected one device, DDP or FSDP, got {name}, which is not supported")
    if not module.automatic_optimization:
        return None

    def scale(device: torch.device) -> Tensor | float:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return _scaled(scaler, device) / trainer.accumulate_grad_batches

    return scale


def transformers_scale(training: Callable[[], Any]) -> Callable[[torch.device], Tensor | float]:
    """Of a Hugging Face Trainer: one part of the step's micro-batches, times the scaler of its Accelerator.

    Also where its loss is divided by the number of all tokens of the step: the term is the mean over micro-batches.

    Args:
        training: gives the Trainer.

    Raises:
        RuntimeError: there is none.
        ValueError: a way of training that scales the loss, or spreads tokens, out of sight.
    """
    trainer = training()
    if trainer is None:
        raise RuntimeError(
            f"`{_OWNER}`: expected to be called by a transformers.Trainer; use attach, step and detach in another loop"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    spread = [kind for kind in ("tp", "cp", "sp") if getattr(parallel, f"{kind}_enabled", False)]
    if trainer.is_deepspeed_enabled or trainer.args.n_gpu > 1 or spread or getattr(trainer, "is_tp_enabled", False):
        got = "DeepSpeed" if trainer.is_deepspeed_enabled else " and ".join(spread) or "another"
        raise ValueError(f"`{_OWNER}`: expected one device, DDP or FSDP, got {got} parallelism, which is not supported")

    def scale(device: torch.device) -> Tensor | float:
        found = training()
        return _scaled(found.accelerator.scaler, device) / found.current_gradient_accumulation_steps

    return scale


def _scaled(scaler: Any, device: torch.device) -> Tensor | float:
    """What a GradScaler multiplies with, without waiting for the device."""
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))
