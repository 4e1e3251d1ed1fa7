"""Kinds of blocks: a strip along the axis of depth, by colour and by letter."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from repflow.monitor.report._axes import Figure, plotly_text
from repflow.monitor.report._runs import Run

KIND_COLORS = {
    "attention": "#77aadd",
    "ssm": "#ee8866",
    "hybrid": "#eedd88",
    "recurrent": "#ffaabb",
    "mlp": "#99ddff",
    "moe": "#44bb99",
    "conv": "#bbcc33",
}
"""Fill of each kind of block (Paul Tol's light scheme: made to carry text, and safe for colour-blind readers)."""
OTHER_KIND_COLOR = "#c8c8c8"
KIND_LETTERS = {"moe": "E"}
"""Letter of a kind in the strip, where it is not the first one of its name."""

_GAP, _THICKNESS = 3, 13
"""Of the strip, beside the plot. Unit: pixels."""
_NARROWEST = {"x": 1 / 26, "y": 1 / 15}
"""Smallest share of the depth that has room for a letter, along either axis."""


def kind_letter(kind: str) -> str:
    """The letter that stands for a kind of block."""
    return KIND_LETTERS.get(kind, kind[:1].upper())


def segments(kinds: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """First block, number of blocks and kind of each stretch of blocks of one kind."""
    first = 0
    for kind, blocks in groupby(kinds):
        count = len(list(blocks))
        yield first, count, kind
        first += count


def kind_pattern(kinds: Sequence[str]) -> str:
    """The letters of the blocks in order, `2S A 3S`: what the strip shows, for those who see no colours."""
    return " ".join(f"{count if count > 1 else ''}{kind_letter(kind)}" for _, count, kind in segments(kinds))


def add_kind_strip(layout: Figure, run: Run, over: str, *, along: str) -> None:
    """Put the strip beside the plot: block l lies between states l and l + 1, or at block l."""
    across = "y" if along == "x" else "x"
    start = 0.0 if over == "state" else -0.5
    layout["shapes"], layout["annotations"] = [], []
    for first, count, kind in segments(run.kinds):
        layout["shapes"].append(
            {
                "type": "rect",
                f"{along}ref": along,
                f"{along}0": start + first,
                f"{along}1": start + first + count,
                f"{across}ref": f"{across} domain",
                f"{across}sizemode": "pixel",
                f"{across}anchor": 1,
                f"{across}0": _GAP,
                f"{across}1": _GAP + _THICKNESS,
                "fillcolor": KIND_COLORS.get(kind, OTHER_KIND_COLOR),
                "line": {"width": 1},
            }
        )
        if count / run.depth >= _NARROWEST[along]:
            layout["annotations"].append(
                {
                    f"{along}ref": along,
                    along: start + first + count / 2,
                    f"{across}ref": f"{across} domain",
                    across: 1,
                    f"{across}shift": _GAP + _THICKNESS / 2,
                    "xanchor": "center",
                    "yanchor": "middle",
                    "text": plotly_text(kind_letter(kind)),
                    "showarrow": False,
                    "font": {"size": 10, "color": "#1c2126"},
                }
            )
