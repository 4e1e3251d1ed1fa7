"""What one monitored step yields: the sums that were accumulated, and the `Snapshot` that is divided out of them.

Everything that repflow reports is a ratio of sums over tokens or over groups (sequences, or documents of packed rows).
The sums of one step live in a single flat float64 vector, so that they are copied from the device in one piece, added
up over micro-batches, ranks or steps by plain addition, and stored in the run file as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from repflow.monitor.alert import Alert
from repflow.monitor.functional.cka import cka_from_hsic
from repflow.monitor.functional.ssm import QUANTILES, RATE_BINS, ssm_values

POSITION_BINS = 64
SSM_QUANTILES = QUANTILES


@dataclass(frozen=True)
class SumLayout:
    """Where each sum of a step lies in the flat vector, for a stream of `num_states` states (S = L + 1).

    `ssm_blocks` are the indices of the M blocks whose decay rates are counted; `probe` says that the states are those
    of a probe batch, which are compared with what they were. All entries are sums, except the last
    ones, named in `MAXIMA`, which are merged by maximum.
    """

    num_states: int
    ssm_blocks: tuple[int, ...] = ()
    probe: bool = False

    MAXIMA: ClassVar[tuple[str, ...]] = ("fourth_moment_max", "mask_max", "document_max", "documents_left_out")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every sum, in the order of the flat vector."""
        states = self.num_states
        transitions, interior, ssm = states - 1, max(states - 2, 0), len(self.ssm_blocks)
        drift = states if self.probe else 0
        return {
            "tokens": (),  # valid tokens measured
            "sequences": (),  # groups with at least one valid token
            "short_sequences": (),  # groups with too few tokens for inter-token similarity (fewer than 2)
            "inter_token": (states,),  # Σ over groups of the similarity of h^(l)
            "inter_token_groups": (states,),
            "update_inter_token": (transitions,),  # the same of Δh^(l)
            "update_inter_token_groups": (transitions,),
            "adjacent": (transitions,),  # Σ over tokens of cos(h^(l), h^(l+1))
            "adjacent_tokens": (transitions, POSITION_BINS),  # the same by relative position in the sequence
            "adjacent_tokens_count": (transitions, POSITION_BINS),
            "adjacent_count": (transitions,),
            "norms": (states,),  # Σ over tokens of ‖h^(l)‖₂
            "norms_count": (states,),
            "local_variance": (interior,),  # Σ over tokens of the feature mean of |second difference|
            "local_variance_count": (interior,),
            "global_variance": (),  # Σ over tokens of the feature mean of the std over states
            "global_variance_count": (),
            "local_variance_relative": (),  # Σ over tokens of the token's local variance / its RMS
            "global_variance_relative": (),
            "relative_count": (),
            "hsic": (states, states),  # Σ over groups of HSIC(a, b)
            "hsic_groups": (),
            "hsic_short_groups": (),  # groups with too few tokens for the estimator
            "fourth_moment": (states,),  # Σ over the tokens of CKA of ‖x_c‖⁴
            "nonfinite": (states,),  # valid tokens with a NaN or an infinity
            "zero": (states,),  # valid tokens that are the zero vector
            "ssm_decay_bins": (ssm, RATE_BINS),  # tokens by −ln ρ_t
            "ssm_memory_bins": (ssm, RATE_BINS),  # tokens × channels by 1/τ
            "ssm_nonfinite": (ssm,),  # valid tokens with a Δ that is a NaN or an infinity
            "drift_hsic": (drift, 3, 3),  # Σ over groups of HSIC of h^(l) now, at first and the time before
            "fourth_moment_max": (states,),  # the largest ‖x_c‖⁴ of one token
            "mask_max": (),  # the largest value of a mask that was read as padding only
            "document_max": (),  # the largest value of a mask that was looked through for documents
            # documents of (rows of) a micro-batch for which there was no room, or sequences not measured whole
            "documents_left_out": (),
        }

    @cached_property
    def _sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes.values()]

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self._sizes)

    @cached_property
    def num_sums(self) -> int:
        """How many of them are sums; the maxima follow."""
        return self.size - sum(prod(self.shapes[name]) for name in self.MAXIMA)

    def zeros(self, device: torch.device | str = "cpu") -> Float64[Tensor, " size"]:
        """An empty vector of sums."""
        return torch.zeros(self.size, dtype=torch.float64, device=device)

    def views(self, flat: Float64[Tensor, "*batch size"]) -> dict[str, Tensor]:
        """The named sums as views into `flat`: writing to one writes to the vector."""
        if flat.shape[-1:] != (self.size,):
            raise ValueError(
                f"`SumLayout.views`: expected vectors of {self.size} sums for {self.num_states} states, "
                f"got shape {tuple(flat.shape)}"
            )
        parts = flat.split(self._sizes, -1)
        return {
            name: part.squeeze(-1) if not shape else part if len(shape) == 1 else part.unflatten(-1, shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def values(self, flat: Float64[Tensor, "*batch size"]) -> dict[str, Tensor]:
        """Everything that is divided out of the sums, under the names and in the shapes of `Snapshot`."""
        part = self.views(flat)
        values = {
            "tokens": part["tokens"].long(),
            "sequences": part["sequences"].long(),
            "inter_token": _ratio(part["inter_token"], part["inter_token_groups"]),
            "update_inter_token": _ratio(part["update_inter_token"], part["update_inter_token_groups"]),
            "adjacent": _ratio(part["adjacent"], part["adjacent_count"]),
            "norms": _ratio(part["norms"], part["norms_count"]),
            "v_loc": _ratio(part["local_variance"].sum(-1), part["local_variance_count"].sum(-1)),
            "v_glob": _ratio(part["global_variance"], part["global_variance_count"]),
            "local_variance": _ratio(part["local_variance"], part["local_variance_count"]),
            "v_loc_rel": _ratio(part["local_variance_relative"], part["relative_count"] * (self.num_states > 2)),
            "v_glob_rel": _ratio(part["global_variance_relative"], part["relative_count"]),
            "cka": cka_from_hsic(part["hsic"]),
            "hsic_top_token": _ratio(part["fourth_moment_max"], part["fourth_moment"]),
            "adjacent_tokens": _ratio(part["adjacent_tokens"], part["adjacent_tokens_count"]),
            "nonfinite": part["nonfinite"].long(),
            "zero": part["zero"].long(),
        }
        if self.ssm_blocks:
            values |= ssm_values(part, self.ssm_blocks, self.num_states - 1)
        if self.probe:
            drift = cka_from_hsic(part["drift_hsic"])[..., 0, :]
            values |= {"drift_first": drift[..., 1], "drift_previous": drift[..., 2]}
        return values

    def merge_(self, into: Float64[Tensor, " size"], other: Float64[Tensor, " size"]) -> None:
        """Add the sums of `other` to `into`, in place."""
        start = self.num_sums
        into[:start] += other[:start]
        torch.maximum(into[start:], other[start:], out=into[start:])


@dataclass(frozen=True, kw_only=True)
class BlockInfo:
    """One block of the stream, as it is stored with a run."""

    index: int
    name: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is being monitored: the metadata of a run, handed to every sink before its first snapshot."""

    name: str
    """Name of the run."""
    stream: str
    """Name of the residual stream (`ResidualStream.name`)."""
    blocks: tuple[BlockInfo, ...]
    """The blocks in order; block l turns state l into state l + 1."""
    model_class: str
    """Class name of the monitored model."""
    parameters: int
    """Number of parameters of the model."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The fields of the `MonitorConfig`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of repflow, torch, python and what else is installed."""

    ssm_blocks: tuple[int, ...] = ()
    """Indices of the blocks whose decay rates are counted; none unless the metric `ssm` is on."""
    probe: bool = False
    """Whether a fixed probe batch is measured, rather than what the model is trained on."""

    @property
    def num_states(self) -> int:
        """S = L + 1."""
        return len(self.blocks) + 1

    @property
    def layout(self) -> SumLayout:
        """Of the sums of this run's snapshots."""
        return SumLayout(self.num_states, self.ssm_blocks, self.probe)

    def to_json(self) -> str:
        """As one JSON object."""
        return json.dumps(asdict(self), ensure_ascii=False, default=str)

    @classmethod
    def from_json(cls, text: str) -> "RunInfo":
        """Inverse of `to_json`. Keys that this version does not know are ignored.

        Raises:
            ValueError: The text is none that `to_json` writes, or lacks a key that this version needs.
        """

        def known(record: type, values: Mapping[str, Any]) -> dict[str, Any]:
            return {entry.name: values[entry.name] for entry in fields(record) if entry.name in values}

        try:
            raw = json.loads(text)
            blocks = tuple(BlockInfo(**known(BlockInfo, block)) for block in raw["blocks"])
            return cls(**{**known(cls, raw), "blocks": blocks, "ssm_blocks": tuple(raw.get("ssm_blocks", ()))})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"`RunInfo.from_json`: expected the description of a run, got one that lacks a key: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """The results of one monitored step.

    All tensors are on the CPU, values in float64 and counts in int64. S = L + 1 states; transition l leads from
    state l to state l + 1 and is the work of block l. Each value was summed over sequences, micro-batches and ranks and
    divided once; NaN says that nothing could be measured (every group too short, every token non-finite, metric
    switched off).
    """

    step: int
    """Optimizer step that was measured."""
    stream: str
    """Name of the residual stream."""
    tokens: int
    """Valid tokens measured."""
    sequences: int
    """Groups (sequences, or documents of packed rows) measured."""
    inter_token: Float64[Tensor, " S"]
    """Mean cosine over pairs of tokens of a sequence (Eq. 2), mean over groups."""
    update_inter_token: Float64[Tensor, " S-1"]
    """The same on the updates Δh^(l) = h^(l+1) − h^(l)."""
    adjacent: Float64[Tensor, " S-1"]
    """Cosine of a token's states before and after a block, mean over tokens."""
    norms: Float64[Tensor, " S"]
    """L2 norm, mean over tokens."""
    v_loc: Float64[Tensor, ""]
    """V_loc (Eq. 3): mean over tokens, features and interior states of |h^(l+1) − (h^(l) + h^(l+2))/2|."""
    v_glob: Float64[Tensor, ""]
    """V_glob (Eq. 4): mean over tokens and features of the population std over states."""
    local_variance: Float64[Tensor, " S-2"]
    """V_loc's mean for each interior state 1 … S−2."""
    v_loc_rel: Float64[Tensor, ""]
    """Mean over tokens of the token's V_loc divided by the RMS of its states; dimensionless."""
    v_glob_rel: Float64[Tensor, ""]
    """Mean over tokens of the token's V_glob divided by the RMS of its states; dimensionless."""
    cka: Float64[Tensor, "S S"]
    """Linear CKA of every pair of states, tokens as examples: ratio of HSIC summed over the step's groups."""
    hsic_top_token: Float64[Tensor, " S"]
    """Largest share of one token in Σ‖x_c‖⁴: near 1, that token alone decides CKA."""
    adjacent_tokens: Float64[Tensor, "S-1 P"]
    """`adjacent` by relative position in the sequence, in 64 bins; NaN where no token fell."""
    nonfinite: Int64[Tensor, " S"]
    """Valid tokens with a NaN or an infinity."""
    zero: Int64[Tensor, " S"]
    """Valid tokens that are the zero vector."""
    ssm_blocks: tuple[int, ...] = ()
    """Indices of the state-space blocks, to which the next three belong; they are None where there is none."""
    ssm_decay: Float64[Tensor, "S-1 Q"] | None = None
    """Decay ρ_t = ‖Ā_t‖₂ of a state-space block, that of its slowest channel: quantiles over tokens, at the levels
    `SSM_QUANTILES`. NaN for other blocks."""
    ssm_memory: Float64[Tensor, "S-1 Q"] | None = None
    """Memory length τ = −1/ln ρ of its channels (heads in Mamba-2): quantiles over tokens × channels. Unit: tokens."""
    ssm_nonfinite: Int64[Tensor, " S-1"] | None = None
    """Valid tokens with a Δ that is a NaN or an infinity: left out of the two above."""
    probe: bool = False
    """Whether all values are those of the probe batch; the next two are None otherwise."""
    drift_first: Float64[Tensor, " S"] | None = None
    """Linear CKA of a state with itself at the first measurement, on the same tokens; 1 there."""
    drift_previous: Float64[Tensor, " S"] | None = None
    """The same with the measurement before; NaN at the first."""
    overhead_ms: float
    """Milliseconds that the monitor itself spent on this step."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """What the training loop logged with the step, such as `loss`."""
    silent_ranks: tuple[int, ...] = ()
    """Ranks that measured nothing of this step: their batch was empty, or their monitor has failed."""
    alerts: tuple[Alert, ...] = ()
    """The failure signatures that this step raised; those raised before are not repeated."""
    signatures: Mapping[str, bool] = field(default_factory=dict)
    """Name of every signature that was judged -> whether it is raised at this step."""
    sums: Float64[Tensor, " size"]
    """The flat vector of sums behind the values, laid out by `SumLayout(S, ssm_blocks, probe)`."""

    @classmethod
    def from_sums(
        cls,
        sums: Float64[Tensor, " size"],
        *,
        num_states: int,
        ssm_blocks: tuple[int, ...] = (),
        probe: bool = False,
        step: int,
        stream: str,
        overhead_ms: float,
        scalars: Mapping[str, float] | None = None,
        silent_ranks: tuple[int, ...] = (),
    ) -> "Snapshot":
        """Divide the sums of a step, or of several steps merged by `SumLayout.merge_`."""
        values: dict[str, Any] = SumLayout(num_states, ssm_blocks, probe).values(sums)
        counts = {name: int(values.pop(name)) for name in ("tokens", "sequences")}
        return cls(
            step=step,
            stream=stream,
            ssm_blocks=ssm_blocks,
            probe=probe,
            overhead_ms=overhead_ms,
            scalars=dict(scalars or {}),
            silent_ranks=silent_ranks,
            sums=sums,
            **counts,
            **values,
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field but `sums` as plain Python numbers, strings, lists and dicts."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "sums"}
        values["alerts"] = [alert.to_dict() for alert in self.alerts]
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """`total / count`, NaN where nothing was counted."""
    return torch.where(count > 0, total / count, torch.nan)
