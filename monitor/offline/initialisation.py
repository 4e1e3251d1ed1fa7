"""Weights drawn anew, and what else the paper's appendix C changes in a model: its norms and its embedding's scale."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from repflow.monitor.offline import OfflineError

Scheme = Literal["default", "gaussian", "xavier", "kaiming"]
VectorPolicy = Literal["default", "trivial", "scheme"]
Drawn = Literal["scheme", "default"]
NormVariant = Literal["baseline", "disabled", "affine_reset"]
Role = Literal["matrix", "embedding", "position", "norm", "bias", "protected", "other"]

STD = 0.02
"""Of the Gaussian scheme, and of biases and norm affines that are drawn, whatever the scheme."""
PROTECTED = re.compile(r"(^|\.)(A_log|D|dt_bias|dt_proj\.bias)$")
"""Parameters of state spaces that are rates and not weights: drawn anew, the recurrence would mean nothing."""
VECTOR_ROLES: tuple[Role, ...] = ("norm", "bias")
"""What the policy decides about."""
_POSITIONS = re.compile(r"(^|\.)(wpe|\w*pos\w*)$")


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """How a model is drawn, every choice of which the paper leaves open but the scheme.

    Raises:
        OfflineError: an unknown name.
    """

    scheme: Scheme = "gaussian"
    """Of parameters with two dimensions or more. `default`: as transformers draws them. `gaussian`: N(0, .02).
    `xavier`, `kaiming`: `xavier_uniform_` and `kaiming_uniform_` of torch with their defaults."""
    policy: VectorPolicy = "scheme"
    """Of biases and norm affines. `default`: as transformers has them. `trivial`: norms 1 and 0, biases 0. `scheme`:
    N(0, .02) under every scheme."""
    embeddings: Drawn = "scheme"
    """Whether token embeddings follow the scheme."""
    positions: Drawn = "scheme"
    """Whether learned positions do."""
    seed: int = 0

    def __post_init__(self) -> None:
        known = {"scheme": Scheme, "policy": VectorPolicy, "embeddings": Drawn, "positions": Drawn}
        for name, choices in known.items():
            if getattr(self, name) not in get_args(choices):
                raise OfflineError(
                    f"initialisation: expected {name} among {', '.join(get_args(choices))}, got {getattr(self, name)!r}"
                )

    def describe(self) -> dict[str, Any]:
        """Every choice, as plain values."""
        return asdict(self) | {"protected": "A_log, D, dt_bias, dt_proj.bias"}


def role_of(module: nn.Module, path: str, parameter: Tensor) -> Role:
    """What a parameter is, for initialisation.

    Args:
        module: whose parameter it is.
        path: dotted path of the parameter.
        parameter: itself.
    """
    owner = path.rpartition(".")[0]
    if PROTECTED.search(path):
        return "protected"
    if isinstance(module, nn.Embedding):
        return "position" if _POSITIONS.search(owner) else "embedding"
    if _is_norm(module):
        return "norm"
    if parameter.ndim >= 2:
        return "matrix"
    return "bias" if path.endswith("bias") else "other"


@torch.no_grad()
def initialise(model: nn.Module, choice: Initialisation) -> dict[str, int]:
    """Draw the parameters of a model anew, in place; `default` leaves what is there.

    No random state but some of its own is used, and vectors have another than matrices: whatever the policy, these are
    the same. The numbers depend on the kind of device that the model is on.

    Returns:
        How many parameters (numbers) there are of each role.
    """
    draw, generators, drawn = _DRAWS[choice.scheme], _Generators(choice.seed), drawn_roles(choice)
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            role = role_of(module, f"{name}.{leaf}" if name else leaf, parameter)
            counts[role] += parameter.numel()
            if role in VECTOR_ROLES:
                trivial = 1.0 if role == "norm" and leaf == "weight" else 0.0
                _set_vector(parameter, trivial, choice.policy, generators.of(parameter, "vector"))
            elif role in drawn:
                draw(parameter, generators.of(parameter, "matrix"))
    return dict(counts)


def drawn_roles(choice: Initialisation) -> set[Role]:
    """The roles of parameters with two dimensions or more that are drawn anew."""
    chosen: dict[Role, str] = {"matrix": "scheme", "embedding": choice.embeddings, "position": choice.positions}
    return set() if choice.scheme == "default" else {role for role, how in chosen.items() if how == "scheme"}


class _Generators:
    """A random generator for every device and kind of parameter."""

    def __init__(self, seed: int) -> None:
        self._seeds = {"matrix": seed, "vector": seed + 2**32}
        self._made: dict[tuple[torch.device, str], torch.Generator] = {}

    def of(self, parameter: Tensor, kind: Literal["matrix", "vector"]) -> torch.Generator:
        place = (parameter.device, kind)
        if place not in self._made:
            self._made[place] = torch.Generator(parameter.device).manual_seed(self._seeds[kind])
        return self._made[place]


def _set_vector(parameter: Tensor, trivial: float, policy: VectorPolicy, generator: torch.Generator) -> None:
    if policy == "trivial":
        parameter.fill_(trivial)
    elif policy == "scheme":
        parameter.normal_(0.0, STD, generator=generator)


_DRAWS: dict[str, Callable[[Tensor, torch.Generator], object]] = {
    "default": lambda parameter, generator: None,
    "gaussian": lambda parameter, generator: parameter.normal_(0.0, STD, generator=generator),
    "xavier": lambda parameter, generator: nn.init.xavier_uniform_(parameter, generator=generator),
    "kaiming": lambda parameter, generator: nn.init.kaiming_uniform_(parameter, generator=generator),
}


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


@contextmanager
def norms_as(model: nn.Module, variant: NormVariant) -> Iterator[int]:
    """The model with its norms as they are, switched off, or with their affine parameters at 1 and 0 (figure 6).

    Switched off, a norm returns what it takes; one that gates, as in Mamba-2, returns it times SiLU of the gate. All
    norms of the model are meant, the final one too. Gives the number of norms that are changed.

    Raises:
        OfflineError: an unknown variant.
    """
    if variant not in get_args(NormVariant):
        raise OfflineError(f"norms: expected one of {', '.join(get_args(NormVariant))}, got {variant!r}")
    norms = [] if variant == "baseline" else [module for module in model.modules() if _is_norm(module)]
    kept = [{name: value.clone() for name, value in norm.state_dict().items()} for norm in norms]
    try:
        for norm in norms:
            if variant == "disabled":
                norm.forward = _pass_on
            else:
                for name, parameter in norm.named_parameters():
                    parameter.data.fill_(0.0 if name == "bias" else 1.0)
        yield len(norms)
    finally:
        for norm, values in zip(norms, kept, strict=True):
            norm.__dict__.pop("forward", None)
            norm.load_state_dict(values)


def _pass_on(hidden: Tensor, gate: Tensor | None = None) -> Tensor:
    return hidden if gate is None else hidden * nn.functional.silu(gate.to(hidden.dtype))


@contextmanager
def embedding_scaled(model: nn.Module, scale: float, *, positions: bool = False) -> Iterator[None]:
    """The model with what its token embedding returns times `scale` (figure 7); with `positions`, learned ones too."""
    chosen = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and (positions or not _POSITIONS.search(name))
    ]

    def scaled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * scale

    hooks = [module.register_forward_hook(scaled) for module in chosen]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
