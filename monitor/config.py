"""`MonitorConfig`: every choice that a monitored run leaves open."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from repflow.monitor.signatures import DEFAULT, Signature
from repflow.triton_kernels.hsic import Estimator

Metric = Literal["inter_token", "adjacent", "variation", "cka", "ssm"]
StatesConvention = Literal["residual", "hf"]
Compiled = Literal["auto"] | bool


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What a `Monitor` measures, how often, and what it may cost.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of its range.
    """

    every_n_steps: int = 50
    """Measure every n-th optimizer step, counted from step 0. Unit: optimizer steps."""
    max_tokens: int = 8192
    """Most tokens measured of one micro-batch, on each rank. Whole sequences first. Unit: tokens."""
    cka_tokens: int = 2048
    """Most tokens of those that enter CKA, whose cost grows with their square. Unit: tokens."""
    ssm_tokens: int = 2048
    """Most tokens of those that enter decay and memory length, of which a large Mamba has thousands per token.

    Unit: tokens.
    """
    max_memory_mib: int = 1024
    """Largest capture buffer. Fewer tokens are measured where `max_tokens` would not fit, and that is said.

    Unit: MiB.
    """
    skip_first_tokens: int = 0
    """Leave out the first tokens of every sequence (attention sinks) from all statistics. Unit: tokens."""
    max_documents: int = 64
    """Packed rows on a GPU: room for so many documents of a micro-batch beyond one per row, since their number cannot
    be known without waiting; in CKA for as many of them as it has of the tokens. Those beyond it are left out of
    similarity or CKA, and that is said. Each costs S·D·24 bytes while a micro-batch is added up, 256 MiB together at
    most; that is so too on the first step of a run whose mask is of integers, until it is known to tell padding only.
    """
    metrics: tuple[Metric, ...] = get_args(Metric)
    """Which families to compute. Norms and the counts of non-finite and zero tokens always are.

    `ssm`, decay and memory length, is of state-space blocks only: a model without any has no such values.
    """
    states: StatesConvention = "residual"
    """`residual`: h^(L) is the output of the last block.

    `hf`: it is taken after the final norm, as `output_hidden_states` of transformers has it.
    """
    cka_estimator: Estimator = "unbiased"
    """Estimator of HSIC; see `repflow.monitor.functional.layer_cka`."""
    compiled: Compiled = "auto"
    """Whether the model runs under `torch.compile`, so that the compiler must find the monitor's taps in it.

    `auto`: if the model or one of its modules is compiled when the monitor is made. True: for a model that will be
    compiled later, or inside of a compiled function, which the monitor cannot see. False: leave the model alone.
    """
    seed: int = 0
    """Chooses sequences and tokens, together with the step. Independent of every other random state."""
    reduce: bool = True
    """Under torch.distributed, add the sums of a published step up over ranks, in one collective.

    Every rank then needs a `Monitor` with the same choices. False: each rank measures its own part.
    """
    signatures: Literal["default"] | tuple[Signature, ...] = "default"
    """Which failure signatures raise alerts; see `repflow.monitor.signatures`. `()`: none."""

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`MonitorConfig`: expected {name} to be an integer, got {value!r}")
            if value < smallest:
                raise ValueError(
                    f"`MonitorConfig`: expected {name} of {smallest} or more, got {value}{_HINTS.get(name, '')}"
                )
        if not isinstance(self.reduce, bool):
            raise TypeError(f"`MonitorConfig`: expected reduce to be True or False, got {self.reduce!r}")
        if isinstance(self.metrics, str):
            raise TypeError(
                f"`MonitorConfig`: expected metrics as a tuple of names, got {self.metrics!r}; "
                f"write ({self.metrics!r},)"
            )
        object.__setattr__(self, "metrics", tuple(self.metrics))
        for metric in self.metrics:
            _check_choice("metrics", metric, get_args(Metric))
        _check_choice("states", self.states, get_args(StatesConvention))
        _check_choice("cka_estimator", self.cka_estimator, get_args(Estimator))
        _check_signatures(self.signatures)
        if self.signatures != "default":
            object.__setattr__(self, "signatures", tuple(self.signatures))
        if not (self.compiled == "auto" or isinstance(self.compiled, bool)):
            raise ValueError(f'`MonitorConfig`: expected compiled to be "auto", True or False, got {self.compiled!r}')

    @classmethod
    def from_options(cls, config: "MonitorConfig | None", options: Mapping[str, Any]) -> "MonitorConfig":
        """A config given as such, or as its fields.

        Raises:
            TypeError: both given, or a field that does not exist.
        """
        if config is not None and options:
            raise TypeError(
                "`MonitorConfig`: expected either a config or single options, got both; "
                f"put {', '.join(options)} into the config"
            )
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"`MonitorConfig`: expected a MonitorConfig, got {config!r}; give its fields by name")
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(options) - set(names)):
            raise TypeError(
                f"`MonitorConfig`: unknown option {', '.join(unknown)}; expected some of {', '.join(names)}"
            )
        return config or cls(**options)

    @property
    def rules(self) -> tuple[Signature, ...]:
        """The failure signatures that `signatures` stands for."""
        return DEFAULT if self.signatures == "default" else self.signatures

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, the signatures with theirs."""
        return asdict(self) | {"signatures": [rule.to_dict() for rule in self.rules]}


_SMALLEST = {
    "every_n_steps": 1,
    "max_tokens": 4,
    "cka_tokens": 4,
    "ssm_tokens": 1,
    "max_memory_mib": 1,
    "max_documents": 0,
    "skip_first_tokens": 0,
    "seed": -(2**63),
}
_HINTS = {
    "every_n_steps": "; to switch monitoring off, leave the monitor out",
    "max_tokens": ", what unbiased CKA needs",
}


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`MonitorConfig`: expected {name} among {', '.join(map(repr, choices))}, got {value!r}")


def _check_signatures(signatures: object) -> None:
    remedy = 'write "default", () for none, or some such as (NonFinite(), CollapseOnset(patience=5))'
    if signatures == "default":
        return
    if not isinstance(signatures, tuple | list):
        raise TypeError(f"`MonitorConfig`: expected signatures as a tuple, got {signatures!r}; {remedy}")
    names: list[str] = []
    for rule in signatures:
        if not isinstance(rule, Signature):
            raise TypeError(
                f"`MonitorConfig`: expected every one of signatures to be a Signature, got {rule!r}; {remedy}"
            )
        names.append(rule.name)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"`MonitorConfig`: expected signatures of different names, got {', '.join(twice)} more than once; "
            "give one of them another name="
        )
