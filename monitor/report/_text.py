"""What the page says about each quantity: definition, range, reading. HTML."""

PAGE = """
<p>Each panel follows the token representations of a language model through its depth while it trained.
<strong>State</strong> <var>h</var><sup>(0)</sup> enters block 0, state <var>h</var><sup>(<var>l</var>+1)</sup>
leaves block <var>l</var>; a model of <var>L</var> blocks has <var>L</var>+1 states. Panels of one row share
their scales, and each spans its run’s whole depth, so that equal places are equal relative depths. Grey, or a
gap in a curve, means that nothing was measured there. Hover for values, drag to zoom, double-click to zoom
out.</p>
"""

SUMMARY = """
<p>Values at the first → last snapshot. “First state” and “last state” are places in depth, h<sup>(0)</sup> and
h<sup>(<var>L</var>)</sup>.</p>
"""

INTER_TOKEN = """
<p>The mean cosine over all pairs of different tokens of a sequence, at one state: (‖Σ<sub>t</sub>
u<sub>t</sub>‖² − n) / (n(n − 1)) with u<sub>t</sub> = h<sub>t</sub> / ‖h<sub>t</sub>‖; mean over sequences (Eq.
2 of arXiv 2510.06640). From −1/(n − 1) to 1. <strong>1</strong>: all tokens point the same way (oversmoothing);
<strong>0</strong>: tokens keep directions of their own.</p>
"""

ADJACENT = """
<p>cos(h<sub>t</sub><sup>(<var>l</var>)</sup>, h<sub>t</sub><sup>(<var>l</var>+1)</sup>), a token before and
after block <var>l</var>, mean over tokens. From −1 to 1. <strong>Near 1</strong>: the block hardly turns the
stream (residual connections alone push it up); <strong>low</strong>: it rewrites it. The colours span the
upper four fifths of the values found; the lowest fifth shares the darkest one.</p>
"""

CKA = """
<p>Linear CKA(a, b) = HSIC(a, b) / √(HSIC(a, a) · HSIC(b, b)), tokens as examples, HSIC summed over sequences.
<strong>1</strong>: two states hold the same geometry up to rotation, shift and scale; <strong>0</strong>:
unrelated. Biased values lie in 0 … 1 and run higher than unbiased ones, which can fall below 0 for few tokens.
HSIC grows as norm⁴: read it together with the largest share of one token under <a
href="#health">Health</a>.</p>
"""

VARIATION = """
<p><strong>V<sub>loc</sub></strong> (Eq. 3): mean over tokens, features and interior states of
|h<sup>(<var>l</var>+1)</sup> − (h<sup>(<var>l</var>)</sup> + h<sup>(<var>l</var>+2)</sup>)/2|, how sharply the
path through depth bends. <strong>V<sub>glob</sub></strong> (Eq. 4): mean over tokens and features of the
standard deviation over states, how far the path wanders. Both are ≥ 0 and in the units of the stream, so they
grow with its scale; divided by the RMS of each token’s states they compare between runs.</p>
"""

NORMS = """
<p>‖h<sub>t</sub><sup>(<var>l</var>)</sup>‖₂, mean over tokens, ≥ 0, in the units of the stream. Steady growth
with depth is usual for a residual stream without a norm between blocks; a jump at one block points to massive
activations.</p>
"""

SCALARS = """
<p>What the training loop logged, at the steps of the snapshots; in the loop’s own units.</p>
"""

HEALTH = """
<p>Tokens with a NaN or an infinity and tokens that are the zero vector are counted and left out of the values
above. The share is max<sub>t</sub> ‖x<sub>t</sub>‖⁴ / Σ<sub>t</sub> ‖x<sub>t</sub>‖⁴ of centred tokens, from
1/n to 1: near 1, one token (often an attention sink) alone decides CKA. Overhead is the monitor’s own time in a
snapshot.</p>
"""
