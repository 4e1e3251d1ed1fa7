"""What the sums of a step say about the measurement itself, such as why values are NaN; and alerts in the terminal."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from repflow.monitor.alert import Alert
from repflow.monitor.delivery import MeasuredStep
from repflow.monitor.masks import PADDING_ARGUMENTS
from repflow.monitor.ranks import Part
from repflow.monitor.sequence_shards import MAX_SEQUENCES
from repflow.monitor.snapshot import RunInfo, Snapshot
from repflow.monitor.warning import AlertWarning, warn
from repflow.triton_kernels.hsic import MIN_TOKENS, Estimator

ALONE = (
    "measures the part of each rank alone: expected a Monitor with the same choices on every rank, and some have none; "
    "make one on every rank (sinks are used on rank 0 alone), or set reduce=False"
)


def misread_mask(step: int, sums: dict[str, Tensor], *, sliced: bool = False) -> str | None:
    """A mask that was read as padding, as those before were, but holds document numbers: pairs may cross documents.

    `sliced`: each rank has a slice of every sequence, so that documents cannot be told from one.
    """
    largest = int(sums["mask_max"])
    if largest <= 1:
        return None
    if sliced:
        return (
            f"expected one sequence in each row under sequence_group, got masks or positions that tell documents apart "
            f"(up to {largest} in a slice), of which slices do not tell how they go on; pass a boolean mask, "
            "monitor.step(k, mask=...), to take each row as one sequence"
        )
    return (
        f"left out step {step}: its mask or positions tell documents apart (up to {largest} in a row), unlike those of "
        "the steps before, and this is seen only afterwards; from now on each document is measured by itself"
    )


def documents_left_out(snapshot: Snapshot, sums: dict[str, Tensor]) -> str | None:
    """More documents than there is room for."""
    number = int(sums["documents_left_out"])
    if not number:
        return None
    return (
        f"left up to {number} documents of a micro-batch out of similarity or CKA on step {snapshot.step}, the last "
        "ones: there is room for max_documents beside one per row, in CKA for its share of the tokens, and for less in "
        "very wide models; raise max_documents, or pass a boolean mask to take each row as one sequence"
    )


def sequences_left_out(snapshot: Snapshot, sums: dict[str, Tensor]) -> str | None:
    """More slices than there is room for, or some of which not all ranks brought theirs."""
    number = int(sums["documents_left_out"])
    if not number:
        return None
    return (
        f"left up to {number} sequences of a sequence_group out of inter-token similarity on step {snapshot.step}: "
        f"there is room for {MAX_SEQUENCES} in a step, and all ranks must bring their slices of a sequence, which "
        "they choose alike only if these are equally long or all fit into max_tokens"
    )


def short_sequences(
    snapshot: Snapshot, sums: dict[str, Tensor], estimator: Estimator, *, sliced: bool = False
) -> str | None:
    """Sequences too short for similarity or for CKA, and none that is not; of NaN there is an alert, not this.

    `sliced`: each rank has a slice of every sequence, and CKA is that of slices.
    """
    if snapshot.nonfinite.any() or (sliced and not snapshot.sequences):
        return None
    what = "sequences"
    if snapshot.sequences == int(sums["short_sequences"]):
        needed, missing = 2, "similarity and CKA are"
    elif sums["hsic_short_groups"] > 0 and sums["hsic_groups"] == 0:
        needed, missing = MIN_TOKENS[estimator], "CKA is"
        what = "slices" if sliced else what
    else:
        return None
    return (
        f"expected {what} of at least {needed} valid tokens, but none of {snapshot.sequences} on step "
        f"{snapshot.step} is that long: {missing} NaN; look at the batch, its mask and skip_first_tokens"
    )


def unread_decays(snapshot: Snapshot, sums: dict[str, Tensor], run: RunInfo) -> str | None:
    """State-space blocks of which no Δ was read."""
    counted = sums["ssm_decay_bins"].sum(-1) + sums["ssm_nonfinite"]
    unread = [
        run.blocks[block].name for block, count in zip(run.ssm_blocks, counted.tolist(), strict=True) if not count
    ]
    if not unread or not snapshot.tokens:
        return None
    return (
        f"read no Δ on step {snapshot.step} in {len(unread)} of {len(run.ssm_blocks)} state-space blocks, the first "
        f"'{unread[0]}': their ssm_decay and ssm_memory are NaN. Expected in_proj (Mamba-2) or x_proj (Mamba) to run "
        "as a module: not so in fused kernels of Mamba, and in mixers without one, as Zamba's; "
        "use_fast_path=False lets it run in mamba_ssm's Mamba, at the price of speed"
    )


def _if_compiled(resident: bool) -> str:
    """What to do about a compiled model of which nothing was seen; `resident`: it had taps."""
    if not resident:
        return "If the model is compiled, make the monitor with compiled=True, before the model first runs"
    return (
        "A compiled model must not have run before it is monitored: make the monitor first, or call "
        "torch.compiler.reset() after making it. Beside another compiled model of its class, set "
        "torch._dynamo.config.skip_nnmodule_hook_guards = False before either runs"
    )


def recorded_nothing(step: MeasuredStep, first_block: str, resident: bool) -> str:
    """A step without a single forward that was measured."""
    skips = any(what.startswith("forwards that") for what in step.ignored)
    skipped = (
        "; where blocks are skipped at random in training, as by LayerDrop, measure a probe_batch" if skips else ""
    )
    seen = ", ".join(f"{number} {what}" for what, number in step.ignored.items()) or "no forward at all"
    return (
        f"recorded nothing on step {step.number}: expected a training-mode forward with gradients through "
        f"'{first_block}', saw {seen}. {_if_compiled(resident)}; if other "
        f"blocks run, or in another order, pass blocks=[...] in the order in which they run{skipped}"
    )


def broken_chain(step: MeasuredStep, broken: str) -> str:
    """A block did not take what the one before it returned."""
    return (
        f"left out forwards of step {step.number}, and those of later steps as long as this is so: {broken}. "
        "Pass blocks=[...] in the order in which they run, up to where this is so"
    )


def unread_mask(what: str, *, probe: bool) -> str:
    """No mask was read, and something looks like one. `probe`: of a probe batch, of which none can be given."""
    given = (
        "Pass what is not 0 at tokens: monitor.step(k, mask=...), or mask=lambda batch: ... of the Lightning callback; "
        "or let the model take it as attention_mask (decoder_attention_mask of a decoder beside an encoder)"
    )
    remedy = "Take a probe_batch without padding" if probe else given
    return (
        "measures every token, padding too if there is any: no mask was seen under a name that is known "
        f"({', '.join(PADDING_ARGUMENTS)}), and {what} may hold some. {remedy}"
    )


def goes_back(step: int, last: int) -> str:
    """Numbers of steps that begin again, as those of batches in each epoch do."""
    return (
        f"measures step {step} after step {last}: expected numbers that grow over all epochs, such as those of "
        "optimizer steps since the start; of steps with the same number a run file shows the last"
    )


def never_entered(step: int) -> str:
    """`monitor.step(k)` without `with`."""
    return f"did not begin step {step}: expected `with monitor.step({step}):` around its forwards, got a call alone"


def silent_ranks(step: int, parts: Mapping[int, Part]) -> str:
    """Some ranks brought nothing to a step."""
    what = {Part.NOTHING: "recorded nothing", Part.STOPPED: "stopped monitoring"}
    named = ", ".join(f"rank {rank} {what[part]}" for rank, part in parts.items() if part in what)
    return f"step {step} is that of the other ranks of {len(parts)}: {named}; see Snapshot.silent_ranks"


def different_steps(step: int, steps: Mapping[int, int]) -> str:
    """The ranks have met with different steps, by rank: their sum means nothing."""
    return (
        f"left out step {step}: expected all ranks to publish the same step, got {dict(steps)} by rank; "
        "call step, publish and flush on all ranks alike"
    )


def tell(alerts: Iterable[Alert]) -> None:
    """Show alerts in the terminal, as warnings."""
    for alert in alerts:
        warn(str(alert), AlertWarning)
