"""Every architecture, looked at and trained with and without the monitor: what tests assert and docs/models.md says."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from repflow.monitor import Monitor, MonitorConfig, Snapshot, find_residual_stream
from tests import handwritten
from tests.architectures import ROWS, TOKENS, VOCABULARY, Architecture

STEPS = 2


@dataclass(frozen=True)
class Trained:
    """How training went under the monitor, next to training without it."""

    states: bool
    """h^(0..L) are bit for bit what hooks of one's own see in a forward of their own."""
    losses: bool
    """All losses are bit for bit those without the monitor."""
    snapshot: bool
    """Everything published is finite."""
    padding: bool
    """Exactly the tokens that are not padding were measured."""


@dataclass(frozen=True)
class Result:
    """What was found of one architecture."""

    name: str
    missing: str = ""
    """Classes that the installed transformers lacks; nothing else was looked at then."""
    path: str = ""
    parts: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    returns: str = ""
    """What blocks return."""
    hidden_states: str = ""
    """What `output_hidden_states` holds; empty for models without."""
    plain: Trained | None = None
    checkpointed: Trained | None = None
    """With activation checkpointing; None where the model has none."""


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens, and a mask: row 0 is padded on the left, row 1 on the right."""
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, -3:] = 0
    return ids, mask


def make(architecture: Architecture, checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    model: Any = architecture.build().train()
    if checkpointing:
        handwritten.enable_checkpointing(model)
    return model


def forward(architecture: Architecture, model: nn.Module, step: int, **options: Any) -> Any:
    """One forward on the batch of a step, with the same dropout each time."""
    ids, mask = batch(step)
    torch.manual_seed(step)
    return model(input_ids=ids, attention_mask=mask, **architecture.arguments(ids), **options)


def loss_of(output: Any) -> Tensor:
    values: Any = getattr(output, "logits", output)
    if not isinstance(values, Tensor):
        values = output.last_hidden_state
    return values.float().log_softmax(-1).square().mean()


def train(architecture: Architecture, model: nn.Module, monitor: Monitor | None = None) -> list[float]:
    """Losses of a few steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(STEPS):
        if monitor is None:
            loss = loss_of(forward(architecture, model, step))
            loss.backward()
        else:
            with monitor.step(step):
                loss = loss_of(forward(architecture, model, step))
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def own_states(architecture: Architecture, model: nn.Module) -> tuple[list[Tensor], list[str]]:
    """h^(0..L) of the first step by hooks of one's own, and what each block returned."""
    blocks = list(model.get_submodule(architecture.path).children())
    seen: list[Tensor] = []
    returned: list[str] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(architecture.taken(args[0] if args else kwargs["hidden_states"]).clone())

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(architecture.returned(output).clone())
        returned.append(shape_of(output))

    handles = [
        blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        *(block.register_forward_hook(leave) for block in blocks),
    ]
    forward(architecture, model, 0)
    for handle in handles:
        handle.remove()
    return seen, returned


def shape_of(output: Any) -> str:
    """What a block returned, in words."""
    if isinstance(output, tuple):
        return f"({', '.join(map(shape_of, output))})"
    return {"Tensor": "tensor", "NoneType": "None"}.get(type(output).__name__, type(output).__name__)


def captured(monitor: Monitor) -> list[Tensor]:
    """Copies of the states of each forward that the monitor captures from now on."""
    seen: list[Tensor] = []
    add = monitor._capture.on_forward

    def keep(captured: Any) -> None:
        seen.append(captured.states.clone())
        add(captured)

    monitor._capture.on_forward = keep
    return seen


def is_finite(snapshot: Snapshot) -> bool:
    # Bins of relative position that no token fell into have no value, nor have blocks without Δ.
    partial = ("adjacent_tokens", "ssm_decay", "ssm_memory")
    tensors = [value for name, value in vars(snapshot).items() if isinstance(value, Tensor) and name not in partial]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def compare(architecture: Architecture, checkpointing: bool) -> tuple[Trained, list[str]]:
    """Training under the monitor next to training without it; and what blocks return."""
    own, returned = own_states(architecture, make(architecture, checkpointing))
    bare = train(architecture, make(architecture, checkpointing))
    model = make(architecture, checkpointing)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1), stream=architecture.stream)
    seen = captured(monitor)
    losses = train(architecture, model, monitor)
    monitor.flush()
    snapshot = monitor.latest
    states = (
        monitor._capture._chain.verified
        and len(seen) == STEPS
        and all(torch.equal(a, b) for a, b in zip(seen[0], own, strict=True))
    )
    tokens = int(architecture.mask(*batch(STEPS - 1)).sum())
    trained = Trained(
        states=states,
        losses=losses == bare,
        snapshot=snapshot is not None and snapshot.step == STEPS - 1 and is_finite(snapshot),
        padding=snapshot is not None and snapshot.tokens == tokens,
    )
    return trained, returned


def hidden_states(architecture: Architecture) -> str:
    """What `output_hidden_states` of transformers holds, next to the states in the `hf` convention."""
    model = make(architecture, checkpointing=False)
    convention = "residual" if find_residual_stream(model, stream=architecture.stream).final_norm is None else "hf"
    config = MonitorConfig(every_n_steps=1, states=convention)
    monitor = Monitor(model, config, stream=architecture.stream)
    seen = captured(monitor)
    with monitor.step(0):
        output = forward(architecture, model, 0, output_hidden_states=True)
    name = "hidden_states" if architecture.stream is None else f"{architecture.stream}_hidden_states"
    theirs = output.hidden_states if name == "hidden_states" else output[name]
    if len(seen) != 1:
        return "not captured"
    ours, last = list(seen[0]), len(seen[0]) - 1
    if len(theirs) == last + 1 and all(map(torch.equal, ours, theirs)):
        return "h0 … h(L−1), norm(hL)" if convention == "hf" else "h0 … hL"
    if all(map(torch.equal, ours[1:last], theirs)) and torch.equal(ours[-1], theirs[-1]) and len(theirs) == last + 1:
        return "h1 … hL, norm(hL)"
    return "something else"


@cache
def examine(architecture: Architecture) -> Result:
    """Everything about one architecture."""
    if architecture.missing:
        return Result(architecture.name, missing=", ".join(architecture.missing))
    stream = find_residual_stream(make(architecture, checkpointing=False), stream=architecture.stream)
    plain, returned = compare(architecture, checkpointing=False)
    model = architecture.build()
    checkpointed = None
    if getattr(model, "supports_gradient_checkpointing", hasattr(model, "gradient_checkpointing_enable")):
        checkpointed, _ = compare(architecture, checkpointing=True)
    return Result(
        name=architecture.name,
        path=stream.blocks[0].name.rpartition(".")[0],
        parts=tuple("+".join(block.parts) or "other" for block in stream.blocks),
        kinds=tuple(block.kind for block in stream.blocks),
        returns=" or ".join(dict.fromkeys(returned)),
        hidden_states=hidden_states(architecture) if architecture.classes else "",
        plain=plain,
        checkpointed=checkpointed,
    )
