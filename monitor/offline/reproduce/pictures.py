"""Pictures of what is written, as PNG and SVG: the same data give the same file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from repflow.monitor.offline.reproduce.pictures_depth import (
    draw_accuracy,
    draw_curves,
    draw_matrices,
    draw_token_maps,
    draw_variation,
)
from repflow.monitor.offline.reproduce.pictures_random import draw_random
from repflow.monitor.offline.reproduce.written import Result

INK, GRID = "#1c2126", "#d9dde1"
"""Of text and axes, and of the lines behind curves: the page gives them the colours of its theme."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # text that can be searched and read aloud
    "svg.hashsalt": "repflow",  # else the names inside are drawn at random
}
_DRAWERS = {
    "figure1": draw_token_maps,
    "figure2": draw_curves,
    "figure3": draw_random,
    "figure4": draw_matrices,
    "figure5": draw_random,
    "figure6": draw_random,
    "figure7": draw_random,
    "table1": draw_accuracy,
    "table2": draw_variation,
}


def draw_result(folder: Path, result: Result) -> Sequence[Path]:
    """Draw one target beside its data."""
    with rc_context(STYLE):
        return save_picture(_DRAWERS[result.target](result), folder, result.target)


def save_picture(figure: Figure, folder: Path, name: str) -> Sequence[Path]:
    """As PNG and SVG, without the date and the versions that a file would otherwise carry."""
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    figure.savefig(paths[0], dpi=160, metadata={"Software": None})
    figure.set_layout_engine("none")  # everything has its place now; finding it takes longer than drawing
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths
