"""What one monitored step yields: the `Snapshot` that is divided out of its sums, and the run that it is of."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from jaxtyping import Float64, Int64
from torch import Tensor

from repflow.monitor.alert import Alert
from repflow.monitor.functional.ssm import QUANTILES
from repflow.monitor.sum_layout import SumLayout

SSM_QUANTILES = QUANTILES


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
