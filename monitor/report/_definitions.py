"""What each quantity of the page is: formula, unit, how to read it, and where it comes from.

The only place where these texts stand: the page shows them one click away, and docs/report.md holds them too.
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
    """What its values tell, and what to do about them."""
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
        source="Eq. 2, Figures 2 and 3",
    ),
    "update_inter_token": Definition(
        title="Inter-token similarity of updates",
        formula="The same of Δh<sub>t</sub><sup>(l)</sup> = h<sub>t</sub><sup>(l+1)</sup> − "
        "h<sub>t</sub><sup>(l)</sup>, what block l adds to each token.",
        unit="dimensionless, −1/(n − 1) … 1",
        reading="Near 1, the block adds the same vector to every token, and so drives them together; near 0, it "
        "treats tokens differently. It tells which block causes what inter-token similarity shows from there on.",
        source="Eq. 2, applied to the updates",
    ),
    "adjacent": Definition(
        title="Adjacent-layer similarity",
        formula="cos(h<sub>t</sub><sup>(l)</sup>, h<sub>t</sub><sup>(l+1)</sup>): a token before and after block l; "
        "mean over tokens.",
        unit="dimensionless, −1 … 1",
        reading="Near 1, the block hardly turns the stream (residual connections alone push it up); low, it rewrites "
        "it. A block that stays at 1 throughout training may be dead.",
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
        source="Section 3.3, Figure 4",
    ),
    "v_loc": Definition(
        title="V_loc",
        formula="Mean over tokens, features and interior states of |h<sup>(l+1)</sup> − (h<sup>(l)</sup> + "
        "h<sup>(l+2)</sup>)/2|.",
        unit="units of the stream, ≥ 0",
        reading="How sharply the path through depth bends. It grows with the scale of the stream: compare runs by the "
        "relative one.",
        source="Eq. 3, Table 2",
    ),
    "v_glob": Definition(
        title="V_glob",
        formula="Mean over tokens and features of the standard deviation of h<sup>(0)</sup> … h<sup>(L)</sup>.",
        unit="units of the stream, ≥ 0",
        reading="How far the path through depth wanders. It grows with the scale of the stream: compare runs by the "
        "relative one.",
        source="Eq. 4, Table 2",
    ),
    "v_loc_rel": Definition(
        title="V_loc / RMS",
        formula="V_loc of a token divided by the root mean square of all its states; mean over tokens.",
        unit="dimensionless, ≥ 0",
        reading="V_loc without the scale of the stream. Rising: layers pull in different directions.",
        source="Eq. 3, made relative",
    ),
    "v_glob_rel": Definition(
        title="V_glob / RMS",
        formula="V_glob of a token divided by the root mean square of all its states; mean over tokens.",
        unit="dimensionless, 0 … 1",
        reading="V_glob without the scale of the stream. Near 0, depth changes next to nothing.",
        source="Eq. 4, made relative",
    ),
    "norms": Definition(
        title="Norm",
        formula="‖h<sub>t</sub><sup>(l)</sup>‖<sub>2</sub>, mean over tokens.",
        unit="units of the stream, ≥ 0",
        reading="Steady growth with depth is usual for a residual stream without a norm between blocks; a jump at one "
        "block points to massive activations, growth over steps without end to instability.",
        source="",
    ),
    "ssm_memory": Definition(
        title="Memory length",
        formula="τ = −1 / ln ρ = 1 / (Δ<sub>t</sub> · min<sub>n</sub> |A<sub>n</sub>|) of every channel (head in "
        "Mamba-2) at every token; quantiles over both.",
        unit="tokens, 1/16 … 65,536",
        reading="After how many tokens a channel has forgotten all but 1/e of its state. Short throughout: the block "
        "sees the last tokens alone. Longer than the sequence: it forgets nothing.",
        source="Section 4, ‖Ā<sub>t</sub>‖ ≤ ρ",
    ),
    "ssm_decay": Definition(
        title="Decay",
        formula="ρ<sub>t</sub> = ‖Ā<sub>t</sub>‖<sub>2</sub> = exp(−Δ<sub>t</sub> · min |A|) of the slowest channel of "
        "a block; quantiles over tokens.",
        unit="dimensionless, 0 … 1",
        reading="What one token leaves of the state before it. Near 1, the state is kept; the paper’s bounds hold "
        "where it stays below 1.",
        source="Section 4, ‖Ā<sub>t</sub>‖ ≤ ρ",
    ),
    "hsic_top_token": Definition(
        title="Largest share of one token in HSIC",
        formula="max<sub>t</sub> ‖x<sub>t</sub>‖⁴ / Σ<sub>t</sub> ‖x<sub>t</sub>‖⁴ of the centred tokens behind CKA.",
        unit="dimensionless, 1/n … 1",
        reading="Near 1, one token alone decides CKA, often an attention sink: measure without it "
        "(<code>skip_first_tokens</code>).",
        source="",
    ),
    "nonfinite": Definition(
        title="Non-finite tokens",
        formula="Valid tokens whose state holds a NaN or an infinity; the state where most were found.",
        unit="tokens, ≥ 0",
        reading="Expected: 0. They are left out of all other values; the first state that has them is where "
        "they arise.",
        source="",
    ),
    "zero": Definition(
        title="Zero tokens",
        formula="Valid tokens whose state is the zero vector; the state where most were found.",
        unit="tokens, ≥ 0",
        reading="Expected: 0. They have no direction, and are left out of cosines.",
        source="",
    ),
    "overhead_ms": Definition(
        title="Monitor overhead",
        formula="Time that the monitor itself spent on a snapshot.",
        unit="milliseconds",
        reading="The first ones are slower where kernels are compiled.",
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
        "Paper": link,
    }
    return [(label, text) for label, text in rows.items() if text]


def markdown() -> str:
    """All definitions as Markdown."""
    parts = []
    for definition in DEFINITIONS.values():
        rows = "\n".join(f"- **{label}**: {text}" for label, text in definition_rows(definition))
        parts.append(f"### {definition.title}\n\n{rows}\n")
    return "\n".join(parts)
