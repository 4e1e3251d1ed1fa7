"""What each quantity of the page is: formula, unit, how to read it, what to do, and where it comes from.

The only place where these texts stand: the page shows them one click away, and the pages of docs/quantities hold them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PAPER = "https://arxiv.org/abs/2510.06640"


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One quantity. Texts are HTML that Markdown takes, too."""

    title: str
    """What headings call it."""
    formula: str
    """How it follows from the states h<sub>t</sub><sup>(l)</sup>."""
    unit: str
    """Unit, and the range of its values."""
    reading: str
    """What its values tell."""
    advice: str
    """What to do about them."""
    source: str
    """Where the paper has it; empty where it is repflow's own."""


DEFINITIONS = {
    "inter_token": Definition(
        title="Inter-token similarity",
        formula="(‖Σ<sub>t</sub> u<sub>t</sub>‖² − n) / (n(n − 1)), u<sub>t</sub> = h<sub>t</sub> / ‖h<sub>t</sub>‖: "
        "the mean cosine over all pairs of the n tokens of a sequence, at one state; mean over sequences.",
        unit="dimensionless, −1/(n − 1) … 1",
        reading="Near 1, all tokens point the same way (oversmoothing); near 0, they keep directions of their own. "
        "The paper finds transformers above .8 early in depth, and state-space models rising in their last layers.",
        advice="Look where along depth it rises, and whether it rises over steps: compare with the first snapshot, for "
        "repetitive text starts high. Then see the updates, which tell the block that causes it; look at the learning "
        "rate and its warm-up, the scale of embeddings and initialisation.",
        source="Eq. 2, Figures 2 and 3",
    ),
    "update_inter_token": Definition(
        title="Inter-token similarity of updates",
        formula="The same of Δh<sub>t</sub><sup>(l)</sup> = h<sub>t</sub><sup>(l+1)</sup> − "
        "h<sub>t</sub><sup>(l)</sup>, what block l adds to each token.",
        unit="dimensionless, −1/(n − 1) … 1",
        reading="Near 1, the block adds the same vector to every token, and so drives them together; near 0, it "
        "treats tokens differently. It tells which block causes what inter-token similarity shows from there on.",
        advice="Look first at the blocks where it is near 1 and inter-token similarity rises behind them: a bias that "
        "grows, attention that is uniform, or a memory far longer than the sequence adds the same to all tokens.",
        source="Eq. 2, applied to the updates",
    ),
    "adjacent": Definition(
        title="Adjacent-layer similarity",
        formula="cos(h<sub>t</sub><sup>(l)</sup>, h<sub>t</sub><sup>(l+1)</sup>): a token before and after block l; "
        "mean over tokens.",
        unit="dimensionless, −1 … 1",
        reading="Near 1, the block hardly turns the stream (residual connections alone push it up); low, it rewrites "
        "it. A block that stays at 1 throughout training may be dead.",
        advice="At 1 for one block: check that it is trained and that its output is added to the stream. Low for one "
        "block: see the norms, for one block may write far more than the others.",
        source="Section 3.2, Figure 1",
    ),
    "adjacent_tokens": Definition(
        title="Adjacent-layer similarity by position",
        formula="cos(h<sub>t</sub><sup>(l)</sup>, h<sub>t</sub><sup>(l+1)</sup>) in 64 bins of the relative position "
        "t / n of the token in its sequence; mean over the tokens of a bin.",
        unit="dimensionless, −1 … 1",
        reading="Columns are blocks, rows are places in the sequence. Rows alike: the block treats all positions "
        "alike, as the paper finds. A row that differs, often the first, is a token with a role of its own, such as an "
        "attention sink.",
        advice="If the first tokens differ from all others, set <code>skip_first_tokens</code> to as many, and see the "
        "other quantities without them.",
        source="Section 3.2, Figure 1",
    ),
    "cka": Definition(
        title="CKA",
        formula="HSIC(a, b) / √(HSIC(a, a) · HSIC(b, b)) of states a and b, linear kernel, tokens as examples, HSIC "
        "summed over sequences.",
        unit="dimensionless; biased 0 … 1, unbiased −1 … 1",
        reading="1: two states hold the same geometry up to rotation, shift and scale; 0: unrelated. Blocks of the "
        "matrix near 1 are layers that repeat each other. Biased values run higher than unbiased ones, which can fall "
        "below 0 for few tokens. HSIC grows as norm⁴: read it together with the largest share of one token.",
        advice="If a run of layers stays near 1 at the end of training, compare with a model of fewer blocks. If the "
        "largest share of one token is near 1, set <code>skip_first_tokens</code> first. For less noise raise "
        "<code>cka_tokens</code>; compare values of one estimator only.",
        source="Section 3.3, Figure 4",
    ),
    "drift_first": Definition(
        title="Drift since the first measurement",
        formula="HSIC(a, b) / √(HSIC(a, a) · HSIC(b, b)) of one state now (a) and at the first measurement (b): its "
        "linear CKA with itself, the tokens of the probe batch as examples, HSIC summed over sequences.",
        unit="dimensionless; biased 0 … 1, unbiased −1 … 1",
        reading="1: the geometry of these tokens is what it was, up to rotation, shift and scale; 0: nothing is left "
        "of it. A state that stays near 1 while others fall is one that training leaves as it was. Only where "
        "<code>probe_batch</code> is given; it begins again with 1 in a run that resumes.",
        advice="If no state leaves 1, check the learning rate, and that the weights are trained. If the first states "
        "fall in fine-tuning, more is rewritten than the last layers: lower the learning rate, or freeze what should "
        "stay.",
        source="",
    ),
    "drift_previous": Definition(
        title="Drift since the measurement before",
        formula="HSIC(a, b) / √(HSIC(a, a) · HSIC(b, b)) of one state now (a) and at the measurement before (b): its "
        "linear CKA with itself, the tokens of the probe batch as examples, HSIC summed over sequences.",
        unit="dimensionless; biased 0 … 1, unbiased −1 … 1",
        reading="A state that stays near 1 has settled. Low: it has moved much between two measurements, as early in "
        "training. A sudden fall at all states from one depth on is a jump. Nothing is there at the first measurement.",
        advice="If it falls suddenly, see the loss at that step and the first state that fell: clip gradients, or look "
        "at the batches in between. If it does not rise towards the end, the learning rate has not decayed enough for "
        "the states to settle.",
        source="",
    ),
    "v_loc": Definition(
        title="V_loc",
        formula="Mean over tokens, features and interior states of |h<sup>(l+1)</sup> − (h<sup>(l)</sup> + "
        "h<sup>(l+2)</sup>)/2|.",
        unit="units of the stream, ≥ 0",
        reading="How sharply the path through depth bends. It grows with the scale of the stream: compare runs by the "
        "relative one.",
        advice="If it jumps, see the norms first: a stream that has grown does that by itself. If the norms are "
        "steady, <code>local_variance</code> in the run file tells the state where the path bends.",
        source="Eq. 3, Table 2",
    ),
    "v_glob": Definition(
        title="V_glob",
        formula="Mean over tokens and features of the standard deviation of h<sup>(0)</sup> … h<sup>(L)</sup>.",
        unit="units of the stream, ≥ 0",
        reading="How far the path through depth wanders. It grows with the scale of the stream: compare runs by the "
        "relative one.",
        advice="If it jumps, see the norms first, and then the relative one, which tells whether anything but the "
        "scale has changed.",
        source="Eq. 4, Table 2",
    ),
    "v_loc_rel": Definition(
        title="V_loc / RMS",
        formula="V_loc of a token divided by the root mean square of all its states; mean over tokens.",
        unit="dimensionless, ≥ 0",
        reading="V_loc without the scale of the stream. Rising: layers pull in different directions.",
        advice="If it keeps rising, see <code>local_variance</code> and adjacent-layer similarity for the blocks that "
        "work against each other, and compare with a lower learning rate.",
        source="Eq. 3, made relative",
    ),
    "v_glob_rel": Definition(
        title="V_glob / RMS",
        formula="V_glob of a token divided by the root mean square of all its states; mean over tokens.",
        unit="dimensionless, 0 … 1",
        reading="V_glob without the scale of the stream. Near 0, depth changes next to nothing.",
        advice="If it is near 0, check that the blocks are trained and that their output is not lost beside a large "
        "embedding: see the norm of state 0 and adjacent-layer similarity.",
        source="Eq. 4, made relative",
    ),
    "norms": Definition(
        title="Norm",
        formula="‖h<sub>t</sub><sup>(l)</sup>‖<sub>2</sub>, mean over tokens.",
        unit="units of the stream, ≥ 0",
        reading="Steady growth with depth is usual for a residual stream without a norm between blocks; a jump at one "
        "block points to massive activations, growth over steps without end to instability.",
        advice="If it grows without end, lower the learning rate, clip gradients, or put a norm on what the block "
        "writes. If it jumps at one block, see the largest share of one token, and watch that block in low precision.",
        source="",
    ),
    "ssm_memory": Definition(
        title="Memory length",
        formula="τ = −1 / ln ρ = 1 / (Δ<sub>t</sub> · min<sub>n</sub> |A<sub>n</sub>|) of every channel (head in "
        "Mamba-2) at every token; quantiles over both.",
        unit="tokens, 1/16 … 65,536",
        reading="After how many tokens a channel has forgotten all but 1/e of its state. Short throughout: the block "
        "sees the last tokens alone. Longer than the sequence: it forgets nothing.",
        advice="If it is longer than the sequence in the last blocks and tokens there become alike, see late "
        "homogenisation among the alerts. If it is short throughout, look at the initialisation of Δ "
        "(<code>dt_bias</code>) and its learning rate, or train on longer sequences.",
        source="Section 4, ‖Ā<sub>t</sub>‖ ≤ ρ",
    ),
    "ssm_decay": Definition(
        title="Decay",
        formula="ρ<sub>t</sub> = ‖Ā<sub>t</sub>‖<sub>2</sub> = exp(−Δ<sub>t</sub> · min |A|) of the slowest channel of "
        "a block; quantiles over tokens.",
        unit="dimensionless, 0 … 1",
        reading="What one token leaves of the state before it. Near 1, the state is kept; the paper’s bounds hold "
        "where it stays below 1.",
        advice="If it reaches 1, the slowest channel forgets nothing: see the memory length for how many channels do "
        "so. If all of it nears 0, Δ has grown: look at its bias and at the learning rate.",
        source="Section 4, ‖Ā<sub>t</sub>‖ ≤ ρ",
    ),
    "hsic_top_token": Definition(
        title="Largest share of one token in HSIC",
        formula="max<sub>t</sub> ‖x<sub>t</sub>‖⁴ / Σ<sub>t</sub> ‖x<sub>t</sub>‖⁴ of the centred tokens behind CKA.",
        unit="dimensionless, 1/n … 1",
        reading="Near 1, one token alone decides CKA, often an attention sink: measure without it "
        "(<code>skip_first_tokens</code>).",
        advice="Set <code>skip_first_tokens</code> to the number of tokens that are sinks, and do not read CKA of "
        "these states until then.",
        source="",
    ),
    "nonfinite": Definition(
        title="Non-finite tokens",
        formula="Valid tokens whose state holds a NaN or an infinity; the report shows the state with most, "
        "loggers the sum over states.",
        unit="tokens, ≥ 0",
        reading="Expected: 0. They are left out of all other values; the first state that has them is where "
        "they arise.",
        advice="Go back to a checkpoint from before the first such step, and look for an overflow in the block before "
        "that state: a division by zero, the logarithm of zero, a mask of −∞ over a whole row, or the range of "
        "float16.",
        source="",
    ),
    "zero": Definition(
        title="Zero tokens",
        formula="Valid tokens whose state is the zero vector; the report shows the state with most, loggers the "
        "sum over states.",
        unit="tokens, ≥ 0",
        reading="Expected: 0. They have no direction, and are left out of cosines.",
        advice="If it is not 0 at state 0, look for an embedding that is zero, such as that of padding, which the mask "
        "should then leave out. Deeper, look at the scale of the block before it.",
        source="",
    ),
    "overhead_ms": Definition(
        title="Monitor overhead",
        formula="Time that the monitor itself spent on a snapshot.",
        unit="milliseconds",
        reading="The first ones are slower where kernels are compiled.",
        advice="If it is too much, raise <code>every_n_steps</code>, or lower <code>max_tokens</code> and "
        "<code>cka_tokens</code>. Without a GPU that the kernels run on, leave out <code>cka</code> from "
        "<code>metrics</code>.",
        source="",
    ),
}


def definition_rows(definition: Definition) -> Sequence[tuple[str, str]]:
    """Label -> HTML, without what is empty."""
    link = f'<a href="{PAPER}">arXiv 2510.06640</a>, {definition.source}' if definition.source else ""
    rows = {
        "Formula": definition.formula,
        "Unit": definition.unit,
        "Reading": definition.reading,
        "What to do": definition.advice,
        "Paper": link,
    }
    return [(label, text) for label, text in rows.items() if text]
