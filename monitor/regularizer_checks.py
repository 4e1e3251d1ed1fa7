"""What a regularizer can be asked for, and of which models."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch.distributed.fsdp import FSDPModule
from torch.nn import DataParallel, Module

from repflow.monitor.residual_stream import ResidualStream
from repflow.monitor.strength import Strength, checked_strength

Term = Literal["similarity", "contrastive"]


def check_choices(owner: str, target: float, layers: object, strength: Strength, term: str) -> None:
    """What can be checked without a model.

    Raises:
        TypeError: a strength, layers or a target of another type.
        ValueError: one out of its range.
    """
    if isinstance(target, bool) or not isinstance(target, int | float):
        raise TypeError(f"`{owner}`: expected a target in [-1, 1], a similarity, got {type(target).__name__}")
    if not (math.isfinite(target) and -1 <= target <= 1):
        raise ValueError(f"`{owner}`: expected a target in [-1, 1], as similarities are, got {target}")
    if term not in get_args(Term):
        raise ValueError(f'`{owner}`: expected term="similarity" or "contrastive", got {term!r}')
    checked_strength(owner, strength)
    if layers == "all":
        return
    numbers = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else None
    if not numbers or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in numbers):
        raise TypeError(f'`{owner}`: expected layers as numbers of states, such as [1, 2], or "all", got {layers!r}')


def existing_layers(layers: Sequence[int] | Literal["all"], stream: ResidualStream) -> tuple[int, ...]:
    """Numbers of the states from 1 up, in order.

    Raises:
        ValueError: one that does not exist, or one twice.
    """
    last = len(stream)
    if isinstance(layers, str):
        return tuple(range(1, last + 1))
    if wrong := [layer for layer in layers if not (1 <= layer <= last or -last <= layer <= -1)]:
        hint = "; state 0 is the input of the first block, which no block returns" if 0 in wrong else ""
        raise ValueError(
            f"`RepresentationRegularizer`: expected layers from 1 to {last}, the states behind the {last} blocks of "
            f"'{stream.name}', or from -1 to -{last}, got {wrong}{hint}"
        )
    numbers = tuple(layer if layer > 0 else last + 1 + layer for layer in layers)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"`RepresentationRegularizer`: expected each layer once, got {list(layers)}")
    return tuple(sorted(numbers))


def check_model(model: Module, stream: ResidualStream) -> None:
    """Raise ValueError for a model whose blocks or tokens are spread in a way that is not supported."""
    modules = [block.module for block in stream.blocks]
    if len(set(modules)) < len(modules):
        raise ValueError(
            f"`RepresentationRegularizer`: expected blocks that run once in a forward, and those of '{stream.name}' "
            "are shared; pass blocks=[...] that are not"
        )
    if any(isinstance(module, DataParallel) for module in model.modules()):
        raise ValueError(
            "`RepresentationRegularizer`: expected a model that is not in DataParallel, whose replicas have no hooks; "
            "use DistributedDataParallel"
        )
    if parameter := _spread_parameter(model):
        raise ValueError(of_parallel(f"'{parameter}' is sharded by more than FSDP"))


def of_parallel(what: str) -> str:
    """The error for tokens that are spread over ranks."""
    return (
        "`RepresentationRegularizer`: expected each rank to hold whole sequences and states, and "
        f"{what}: tensor, sequence and context parallelism are not supported"
    )


def _spread_parameter(model: Module) -> str | None:
    """The name of a parameter that more than FSDP has sharded, as tensor parallelism does; None if there is none."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, parameter in model.named_parameters():
        placements = getattr(parameter, "placements", ())
        if sum(not placement.is_replicate() for placement in placements) > int(sharded):
            return name
    return None
