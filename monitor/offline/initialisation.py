"""Weights drawn anew, and what else the paper's appendix C changes in a model: its norms and its embedding's scale."""

import inspect
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
    `xavier`, `kaiming`: `xavier_uniform_` and `kaiming_uniform_` of torch with their defaults, of a `Conv1D` of
    transformers, which keeps `[in, out]`, with its fans in their right order."""
    policy: VectorPolicy = "scheme"
    """Of biases and norm affines. `default`: as transformers has them. `trivial`: norms 1 and 0 (see
    `neutral_affine`), biases 0. `scheme`: N(0, .02) under every scheme."""
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

    Raises:
        OfflineError: the policy is `trivial`, and there is a norm of which this cannot be told.
    """
    draw, generators, drawn = _DRAWS[choice.scheme], _Generators(choice.seed), drawn_roles(choice)
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        trivial = neutral_affine(module) if choice.policy == "trivial" and _is_norm(module) else {}
        for leaf, parameter in module.named_parameters(recurse=False):
            role = role_of(module, f"{name}.{leaf}" if name else leaf, parameter)
            counts[role] += parameter.numel()
            if role in VECTOR_ROLES:
                _set_vector(parameter, trivial.get(leaf, 0.0), choice.policy, generators.of(parameter, "vector"))
            elif role in drawn:
                outputs_first = parameter.T if _is_transposed(module) else parameter
                draw(outputs_first, generators.of(parameter, "matrix"))
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


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is the `Conv1D` of transformers, a linear layer whose weight is `[in, out]`, as GPT-2 has."""
    return type(module).__name__ == "Conv1D"


@torch.no_grad()
def neutral_affine(norm: nn.Module) -> dict[str, float]:
    """The values at which the affine parameters of a norm do nothing: "1 and 0" of a policy and of figure 6.

    0 for a bias. 1 for a weight, or 0 where the norm scales by 1 + weight, as in Gemma: its output at weight 0 tells,
    which is 0 in a norm that scales by the weight alone.

    Args:
        norm: is left as it was.

    Raises:
        OfflineError: it scales in some other way, or cannot be called by itself.
    """
    own = dict(norm.named_parameters(recurse=False))
    scales = [name for name in own if name != "bias"]
    if not scales or type(norm) in _SCALED_BY_WEIGHT:
        return {name: float(name in scales) for name in own}
    kept = {name: parameter.clone() for name, parameter in own.items()}
    try:
        at_zero, at_two = (_output(norm, own[scales[0]], dict.fromkeys(scales, value)) for value in (0.0, 2.0))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a norm of someone else raises
        raise _unknown_scale(norm, f"it cannot be called by itself ({error})") from error
    finally:
        for name, parameter in own.items():
            parameter.copy_(kept[name])
    if bool((at_zero == 0).all()):
        neutral = 1.0
    elif torch.allclose(at_two, 3 * at_zero, rtol=0.02, atol=1e-4):
        neutral = 0.0
    else:
        raise _unknown_scale(norm, f"it scales neither by {scales[0]} nor by 1 + {scales[0]}")
    return {name: neutral if name in scales else 0.0 for name in own}


_SCALED_BY_WEIGHT = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d)
"""Not what is derived from them."""


def _output(norm: nn.Module, like: Tensor, values: dict[str, float]) -> Tensor:
    """What a norm makes of some token, at these values of its affine parameters and 0 of its biases."""
    for name, parameter in norm.named_parameters(recurse=False):
        parameter.fill_(values.get(name, 0.0))
    token = torch.linspace(-1.0, 2.0, like.numel(), device=like.device).to(like.dtype).view(1, 1, *like.shape)
    gate = {"gate": torch.ones_like(token)} if "gate" in inspect.signature(norm.forward).parameters else {}
    return norm.forward(token, **gate).float()  # not called: hooks are for the model's own tokens


def _unknown_scale(norm: nn.Module, reason: str) -> OfflineError:
    return OfflineError(
        f"{type(norm).__name__}: expected a norm whose affine parameters can be brought to 1 and 0, and {reason}; "
        "leave out the policy 'trivial' and figure 6"
    )


@contextmanager
def norms_as(model: nn.Module, variant: NormVariant) -> Iterator[int]:
    """The model with its norms as they are, switched off, or with their affine parameters at 1 and 0 (figure 6).

    Switched off, a norm returns what it takes; one that gates, as in Mamba-2, returns it times SiLU of the gate. All
    norms of the model are meant, the final one too. Gives the number of norms that are changed. For 1 and 0 see
    `neutral_affine`.

    Raises:
        OfflineError: an unknown variant, or a norm whose parameters cannot be brought to 1 and 0.
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
                for name, value in neutral_affine(norm).items():
                    norm.get_parameter(name).data.fill_(value)
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
