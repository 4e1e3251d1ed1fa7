"""Draws what compare.py has gathered: similarity and retrieval, as PNG and SVG beside the tables.

python draw.py examples/regularizer/results
"""

import argparse
import csv
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from compare import SAMPLES
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from regularize import CHOSEN, PARTS

from repflow.monitor.offline.reproduce.pictures import STYLE, save_picture

ARMS = {"without": "#5f6b76", "with": "#c2410c"}
"""What is drawn, with its colour."""
LIMIT: dict[str, Any] = {"color": "#5f6b76", "linewidth": 0.8, "linestyle": (0, (1, 3))}
TITLES = {"transformer": "Transformer", "ssm": "State-space model", "hybrid": "Hybrid"}

Row = dict[str, str]


def main() -> None:
    """Read the tables and draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).resolve().parent / "results")
    folder = parser.parse_args().results
    similarity, runs = read(folder / "similarity.csv"), read(folder / "runs.csv")
    with rc_context(STYLE):
        targets = {row["family"]: float(row["target"]) for row in runs if row["target"]}
        figures = {"similarity": draw_similarity(similarity, targets), "retrieval": draw_retrieval(runs)}
        for name, figure in figures.items():
            print(*save_picture(figure, folder, name), sep="\n")


def read(path: Path) -> list[Row]:
    """The rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw_similarity(rows: list[Row], targets: dict[str, float]) -> Figure:
    """Over depth at the last sampled steps, above; below over the steps, the mean of the states acted on."""
    families = [family for family in TITLES if any(row["family"] == family for row in rows)]
    figure, axes = grid(families)
    for column, family in enumerate(families):
        depth, time = axes[0, column], axes[1, column]
        of_family = [row for row in rows if row["family"] == family]
        acted = {state for part in CHOSEN[family] for state in PARTS[part](max(int(row["state"]) for row in of_family))}
        for state in acted:
            depth.axvspan(state - 0.5, state + 0.5, color="#fbe9df", linewidth=0)
        for arm in ARMS:
            of_arm = [row for row in of_family if row["regularizer"] == arm]
            end = sorted({int(row["step"]) for row in of_arm})[-SAMPLES:]
            band(depth, arm, (row for row in of_arm if int(row["step"]) in end), lambda row: int(row["state"]))
            band(time, arm, (row for row in of_arm if int(row["state"]) in acted), lambda row: int(row["step"]))
        for axis in (depth, time) if family in targets else ():
            axis.axhline(targets[family], **LIMIT, label="target")
        depth.xaxis.set_major_locator(MaxNLocator(integer=True))
        depth.set(title=TITLES[family], xlabel="state h^(l)", ylabel="inter-token similarity")
        time.set(xlabel="optimizer step", ylabel="similarity of the shaded states")
    legend(figure, axes[0, 0])
    return figure


def band(axes: Any, arm: str, rows: Iterable[Row], place: Callable[[Row], int]) -> None:
    """The mean over seeds of the mean at each place, and the range of the seeds around it."""
    values: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        values.setdefault(place(row), {}).setdefault(row["seed"], []).append(float(row["inter_token"]))
    places = sorted(values)
    seeds = [[statistics.mean(found) for found in values[at].values()] for at in places]
    low, high = [min(found) for found in seeds], [max(found) for found in seeds]
    axes.fill_between(places, low, high, color=ARMS[arm], alpha=0.2, linewidth=0)
    axes.plot(places, [statistics.mean(found) for found in seeds], color=ARMS[arm], label=arm)


def draw_retrieval(rows: list[Row]) -> Figure:
    """Share of answers retrieved whole by context length, and loss on text: each seed a dot, and their mean."""
    families = [family for family in TITLES if any(row["family"] == family for row in rows)]
    figure, axes = grid(families)
    for column, family in enumerate(families):
        of_family = [row for row in rows if row["family"] == family]
        lengths = {row["pairs"]: f"{row['pairs']} pairs\n{row['prompt_tokens']} tokens" for row in of_family}
        chances = {row["pairs"]: float(row["chance_of_first"]) for row in of_family}
        text = [row for row in of_family if row["pairs"] == next(iter(lengths))]
        means(axes[0, column], of_family, list(lengths), lambda row: row["pairs"], "whole")
        for place, pairs in enumerate(lengths):
            label = None if place else "copying any of the values"
            axes[0, column].plot([place - 0.4, place + 0.4], [chances[pairs]] * 2, **LIMIT, label=label)
        axes[0, column].set_xticks(range(len(lengths)), lengths.values())
        axes[0, column].set(title=TITLES[family], ylabel="answers retrieved whole", ylim=(-0.03, 1.03))
        means(axes[1, column], text, [""], lambda _: "", "text_nats")
        axes[1, column].set(xticks=[], xlim=(-0.8, 0.8), ylabel="loss on text, nats per token")
        axes[1, column].margins(y=0.5)
    legend(figure, axes[0, 0])
    return figure


def means(axes: Any, rows: list[Row], groups: list[str], group_of: Callable[[Row], str], name: str) -> None:
    """A dot for each seed, side by side, and a line at their mean, for each arm in each group."""
    for number, (arm, colour) in enumerate(ARMS.items()):
        label: str | None = arm
        for place, group in enumerate(groups):
            found = [float(row[name]) for row in rows if row["regularizer"] == arm and group_of(row) == group]
            if not found:
                continue
            at = place + 0.36 * (number - 0.5)
            beside = [at + 0.06 * (seed - (len(found) - 1) / 2) for seed in range(len(found))]
            axes.plot([at - 0.14, at + 0.14], [statistics.mean(found)] * 2, color=colour, label=label)
            axes.scatter(beside, found, color=colour, s=14, alpha=0.6, linewidth=0, zorder=3)
            label = None


def grid(families: list[str]) -> tuple[Figure, Any]:
    """Two rows of axes, a column for each family."""
    figure = Figure(figsize=(3.3 * len(families), 5.6), layout="constrained")
    return figure, figure.subplots(2, len(families), squeeze=False)


def legend(figure: Figure, axes: Any) -> None:
    """One for all, below them."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [f"{label} regularizer" if label in ARMS else label for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


if __name__ == "__main__":
    main()
