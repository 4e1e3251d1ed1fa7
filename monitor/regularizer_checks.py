"""What a regularizer can be asked for, and of which models."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Literal, SupportsIndex, cast, get_args

from torch.distributed.fsdp import FSDPModule
from torch.nn import DataParallel, Module

from repflow.monitor.residual_stream import Block, ResidualStream
from repflow.monitor.strength import Strength, checked_strength

Term = Literal["similarity", "contrastive"]

IDLE_STEPS = 20
"""In so many steps running a layer may not act: LayerDrop skips a block now and then, and hardly ever that often."""


def check_choices(owner: str, target: float, layers: object, strength: Strength, term: str) -> None:
    """What can be checked without a model.

    Raises:
        TypeError: a strength, layers or a target of another type.
        ValueError: one out of its range.
    """
    if isinstance(target, bool) or not isinstance(target, Real):
        raise TypeError(f"`{owner}`: expected a target in [-1, 1], a similarity, got {type(target).__name__}")
    if not (math.isfinite(target) and -1 <= target <= 1):
        raise ValueError(f"`{owner}`: expected a target in [-1, 1], as similarities are, got {target}")
    if term not in get_args(Term):
        raise ValueError(f'`{owner}`: expected term="similarity" or "contrastive", got {term!r}')
    checked_strength(owner, strength)
    chosen_layers(owner, layers)


def chosen_layers(owner: str, layers: object) -> list[int] | Literal["all"]:
    """Layers as plain numbers, from any that are integers.

    Raises:
        TypeError: something else, or none.
    """
    if isinstance(layers, str) and layers == "all":
        return "all"
    given = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str | Mapping) else []
    try:
        numbers = [operator.index(cast(SupportsIndex, layer)) for layer in given if not isinstance(layer, bool)]
    except TypeError:
        numbers = []
    if not given or len(numbers) < len(given):
        raise TypeError(f'`{owner}`: expected layers as numbers of states, such as [1, 2], or "all", got {layers!r}')
    return numbers


def existing_layers(layers: Sequence[int] | Literal["all"], stream: ResidualStream) -> tuple[int, ...]:
    """Numbers of the states from 1 up, in order.

    Raises:
        ValueError: one that does not exist, or one twice.
    """
    last = len(stream)
    layers = chosen_layers("RepresentationRegularizer", layers)
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


def check_trained(model: Module, stream: ResidualStream, layer: int) -> None:
    """Raise RuntimeError if nothing up to a state is trained, though it may carry a gradient that ends at the input."""
    behind = {id(weight) for block in stream.blocks[layer:] for weight in block.module.parameters()}
    if not any(weight.requires_grad and id(weight) not in behind for weight in model.parameters()):
        raise RuntimeError(of_frozen(stream.blocks[layer - 1].name))


def of_frozen(name: str) -> str:
    """The error for a state that moves no weight."""
    return (
        f"`RepresentationRegularizer`: expected the state behind '{name}' to carry a gradient to what is trained, but "
        "everything up to there is frozen: the term would train nothing; choose layers behind the first trained one "
        "(for a trained input, attach to a module that holds it)"
    )


def check_recorded(acted: Sequence[int], step: int, block: Block, forward: str, *, replaced: bool) -> None:
    """Raise RuntimeError if no gradient has come back in a step."""
    if any(acted):
        return
    if replaced:
        raise RuntimeError(
            "`RepresentationRegularizer`: expected to be attached, and another regularizer of the same model has taken "
            "its place; step that one, or call `attach` again"
        )
    raise RuntimeError(
        f"`RepresentationRegularizer`: expected a backward through '{block.name}' in each optimizer step, but "
        f"{forward} and no gradient has come back in step {step}; call `step` once for each optimizer step, attach "
        "after the model is compiled, and choose layers whose states carry a gradient"
    )


def check_acting(idle: Sequence[int], blocks: Sequence[Block]) -> None:
    """Raise RuntimeError if a layer has not acted for long, though others have."""
    if names := [block.name for block, steps in zip(blocks, idle, strict=True) if steps >= IDLE_STEPS]:
        raise RuntimeError(
            f"`RepresentationRegularizer`: expected a gradient through each chosen layer, but none has come through "
            f"{', '.join(map(repr, names))} in the last {IDLE_STEPS} steps: is it frozen up to there, in evaluation "
            "mode, compiled after `attach`, skipped, or behind where the loss leaves the model? Choose other layers, "
            "or attach after the model is compiled"
        )


def check_stepped(left_behind: Iterable[Sequence[int]], stream: str) -> None:
    """Raise RuntimeError for regularizers of a stream, told by their layers, that act and make no steps."""
    for layers in left_behind:
        raise RuntimeError(
            f"`RepresentationRegularizer`: expected every regularizer of '{stream}' to be stepped, and that of layers "
            f"{list(layers)} acts without; call its `step`, or its `detach`"
        )


def check_faults(faults: Sequence[float], step: int, room: int) -> None:
    """Raise RuntimeError for documents that found no room, or forwards whose loss had a negative scale, in a step."""
    left_out, negative = map(int, faults)
    if left_out:
        raise RuntimeError(
            f"`RepresentationRegularizer`: expected at most {room} documents in a micro-batch beyond one per row, and "
            f"{left_out} more were left out of step {step}; raise max_documents"
        )
    if negative:
        raise RuntimeError(
            "`RepresentationRegularizer`: expected what the model returns as its loss to be minimised, but in step "
            f"{step} a negative gradient came back there in {negative} forwards, as a log-likelihood or the margin of "
            "two losses has it: the term would draw tokens together; call `follow(loss)` with what `backward` begins "
            "with, before that is divided or scaled"
        )


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
