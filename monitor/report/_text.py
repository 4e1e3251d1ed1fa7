"""What the page says beside the definitions, which stand in `_definitions`. HTML."""

PAGE = """
<p>Token representations of a language model, followed through its depth while it trained.
<strong>State</strong> <var>h</var><sup>(0)</sup> enters block 0, state <var>h</var><sup>(<var>l</var>+1)</sup> leaves
block <var>l</var>. Panels of one row share their scales, and each spans its run’s whole depth. Grey, or a gap in a
curve: nothing was measured there. Hover for values, or go to a figure with Tab and use the arrow keys; drag to zoom,
double-click to zoom out.</p>
"""

SUMMARY = """
<p>Values at the first → last snapshot, at places in depth: first, middle and last state.</p>
"""

ALERTS = """
<p>What the monitor’s rules found while it measured. Marks at the top of plots over steps are the same alerts.</p>
"""
NO_ALERTS = """
<p>None: no rule was violated in any snapshot.</p>
"""

INTER_TOKEN = """
<p>How alike the tokens of a sequence are. <strong>1</strong>: all point the same way (oversmoothing);
<strong>0</strong>: each keeps a direction of its own.</p>
"""

UPDATES = """
<p>How alike the updates are that a block adds to its tokens. <strong>1</strong>: all tokens are pushed the same way,
and so together; <strong>0</strong>: each its own way.</p>
"""

ADJACENT = """
<p>How much a block turns a token. <strong>Near 1</strong>: hardly; <strong>low</strong>: it rewrites the stream. The
colours span the upper four fifths of the values found; the lowest fifth shares the darkest one.</p>
"""

CKA = """
<p>Which states hold the same geometry. <strong>1</strong>: equal up to rotation, shift and scale; <strong>0</strong>:
unrelated. One token of large norm can decide it: see <a href="#health">Health</a>.</p>
"""

DRIFT = """
<p>How far each state has moved on the tokens of the probe batch, which are the same at every step. <strong>1</strong>:
its geometry is what it was, up to rotation, shift and scale; <strong>0</strong>: nothing is left of it. Against the
measurement before, the colours span the upper four fifths of the values found, for the first steps move most.</p>
"""

VARIATION = """
<p>How sharply (V<sub>loc</sub>) and how far (V<sub>glob</sub>) the path through depth turns. Divided by the RMS of each
token’s states they compare between runs.</p>
"""

NORMS = """
<p>How large the states are. A jump at one block points to massive activations.</p>
"""

SSM = """
<p>How long state-space blocks remember: medians as points, thick bars from the 25th to the 75th percentile, thin ones
from the 5th to the 95th.</p>
"""

SCALARS = """
<p>What the training loop logged, at the steps of the snapshots, in the loop’s own units.</p>
"""

HEALTH = """
<p>Tokens that could not be measured, tokens that alone decide CKA, and what the monitor itself costs.</p>
"""

COMPARE = """
<p>One run minus another, at the chosen step. Curves over steps are differences at the steps of A, those of B
interpolated linearly between its snapshots. Red: A is larger; blue: B is.</p>
"""
COMPARE_DEPTHS = """
<p>Where the two have different numbers of blocks, curves run over relative depth, B interpolated linearly at the places
of A; matrices have no places in common and cannot be compared.</p>
"""

START = """Dotted curves of step 0 are from before the first update: random initialisation where a run was trained from
scratch, which a run file does not tell."""
NO_START = """No run holds step 0, so that there is no curve from before training."""
BASELINE = """Grey: baselines given beside the runs, each at its first snapshot."""
