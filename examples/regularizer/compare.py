"""Trains transformer, state-space model and hybrid with the regularizer and without, and gathers what is seen.

python compare.py --seconds 300 --work regularizer-work --results examples/regularizer/results

A pilot of each family tells how many steps these seconds are; all its models train for as many. Those without the
regularizer come first: the target of the others is a share of the similarity that they end with. As many models train
at once as there are GPUs, times --per-gpu. The results folder gets runs.csv, one row for each model and context length;
similarity.csv, the similarity by depth and step of each; loss.csv, their losses; and summary.csv, means and standard
deviations over seeds. A model whose result is there already is not trained again; one that was made with other options
is not taken for it.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "paper"))

import _corpus
import torch
from _kept import is_there
from regularize import PARTS, choices_of
from regularize import parse as parse_one
from run import call, number_by_name, settle, text_of, visible

HERE = Path(__file__).resolve().parent
FAMILIES = ("ssm", "hybrid", "transformer")
"""The slowest to compile first."""
_COPIED = 0.9
SAMPLES = 10
"""Sampled steps that a similarity of the tables is the mean of: one of them may have much text, or little."""
_PLACES = ("corpus", "out")
_UNUSED = ("target", "maximum")
"""Choices that mean nothing without the regularizer."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One model."""

    family: str
    arm: str
    seed: int

    def __str__(self) -> str:
        """Its name, such as `ssm-with-0`."""
        return f"{self.family}-{self.arm}-{self.seed}"


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known here is for regularize.py."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further options are passed on to regularize.py, such as --maximum 0.5 or --rows 16.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=300, help="of training, of each model")
    parser.add_argument(
        "--steps",
        nargs="+",
        metavar="[FAMILY=]STEPS",
        help="optimizer steps instead, of each family or of one; no pilots are trained",
    )
    parser.add_argument("--per-gpu", type=int, default=1, help="models that share a GPU, or the CPU")
    parser.add_argument("--share", type=float, default=0.5, help="of the similarity without: the target with")
    parser.add_argument("--text", type=Path, help="folder of text; installed Python packages if left out")
    parser.add_argument("--text-mib", type=float, help="most text to read; 64, or 1 if tiny")
    parser.add_argument("--tiny", action="store_true", help="models for trying things out on a CPU")
    parser.add_argument("--work", type=Path, help="regularizer-work, or regularizer-work-tiny, if left out")
    parser.add_argument("--results", type=Path, help="results beside this file, or in the work folder if tiny")
    options, passed = parser.parse_known_args()
    if options.steps is not None:
        try:
            found = number_by_name(options.steps, options.families, 0)
        except ValueError as error:
            parser.error(f"--steps: {error}")
        if missing := [family for family, steps in found.items() if steps < 1]:
            parser.error(f"--steps: expected a number for every family, got none for {', '.join(missing)}")
        options.steps = {family: round(steps) for family, steps in found.items()}
    if options.per_gpu < 1:
        parser.error(f"--per-gpu: expected 1 or more, got {options.per_gpu}")
    settle(options, Path("regularizer-work"), HERE / "results")
    return options, passed + text_of(options)


def main() -> int:
    """Train all of them and gather the results; 0 if nothing failed."""
    options, passed = parse()
    _corpus.prepare(options.work / "corpus", options.text_mib, options.text)
    steps = options.steps
    if steps is None:
        pilots = [Run(family, "pilot", 0) for family in options.families]
        short = ["--seconds", options.seconds / 10, "--samples", 1]
        steps = {run.family: steps_in(options, run) for run in train(pilots, options, lambda _: [*short, *passed])}
    runs = [Run(family, "without", seed) for seed in options.seeds for family in steps]
    trained = train(runs, options, lambda run: ["--steps", steps[run.family], *passed])
    targets = {family: target_of(options, family, trained) for family in {run.family for run in trained}}
    runs = [Run(run.family, "with", run.seed) for run in trained]
    trained += train(
        runs, options, lambda run: ["--steps", steps[run.family], "--target", targets[run.family], *passed]
    )
    if trained:
        gather(trained, options)
    return int(len(trained) < 2 * len(options.seeds) * len(options.families))


def train(runs: list[Run], options: argparse.Namespace, arguments: Callable[[Run], list[object]]) -> list[Run]:
    """Train models in processes of their own, as many at once as there are GPUs; those that ended well.

    Raises:
        SystemExit: one is there that was made with other options.
    """
    told = {run: arguments_of(run, options, arguments(run)) for run in runs}
    there = {run: is_trained(run, options, told[run]) for run in runs}
    free: Queue[int | None] = Queue()
    gpus: list[int | None] = [*range(torch.cuda.device_count())] or [None]
    for gpu in gpus * options.per_gpu:
        free.put(gpu)

    def one(run: Run) -> bool:
        if there[run]:
            return True
        log, gpu = options.work / "logs" / f"{run}.log", free.get()
        try:
            command = [sys.executable, HERE / "regularize.py", *told[run]]
            done = call(command, log, {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible(gpu)})
        finally:
            free.put(gpu)
        print(f"{run}: {'trained' if done else f'failed; see {log}'}", flush=True)
        return done

    with ThreadPoolExecutor(free.qsize()) as pool:
        return [run for run, done in zip(runs, pool.map(one, runs), strict=True) if done]


def arguments_of(run: Run, options: argparse.Namespace, arguments: list[object]) -> list[str]:
    """What regularize.py is told; of the regularizer what was passed on, but for the models without it."""
    strength = [] if run.arm == "with" else ["--strength", "none"]
    about = ["--family", run.family, "--seed", run.seed, "-o", options.work / str(run)]
    return [str(part) for part in ("--corpus", options.work / "corpus", *arguments, *strength, *about)]


def is_trained(run: Run, options: argparse.Namespace, arguments: list[str]) -> bool:
    """Whether a model is there, as it is asked for; see `is_there`."""
    of_no_matter = _PLACES if run.arm == "with" else _PLACES + _UNUSED
    asked = {name: value for name, value in choices_of(parse_one(arguments)).items() if name not in of_no_matter}
    return is_there(options.work / str(run) / "result.json", asked)  # written last


def result_of(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """What a model's process wrote last."""
    return json.loads((options.work / str(run) / "result.json").read_text())


def curve_of(options: argparse.Namespace, run: Run) -> list[dict[str, str]]:
    """Similarity of every state at every sampled step."""
    with (options.work / str(run) / "similarity.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def steps_in(options: argparse.Namespace, pilot: Run) -> int:
    """How many steps the seconds are, at the speed of a pilot."""
    found = result_of(options, pilot)
    return max(1, round(options.seconds * found["steps"] / found["seconds"]))


def target_of(options: argparse.Namespace, family: str, trained: list[Run]) -> float:
    """The share of what the models without have at the last sampled step, over the states that the term will act on."""
    similarities = [
        similarity_of(curve_of(options, run), part, samples=1)
        for run in trained
        if run.family == family
        for part in result_of(options, run)["choices"]["layers"]
    ]
    return round(options.share * statistics.mean(similarities), 4)


def gather(runs: list[Run], options: argparse.Namespace) -> None:
    """Write the four tables."""
    options.results.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    curves: list[Row] = []
    losses: list[Row] = []
    for run in runs:
        found, curve, loss = result_of(options, run), curve_of(options, run), losses_of(options, run)
        about = {"family": run.family, "regularizer": run.arm, "seed": run.seed}
        curves += [about | row for row in curve]
        losses += [about | row for row in loss]
        shared = {"text_nats": found["text"]["nats_per_token"], "steps": found["steps"], "seconds": found["seconds"]}
        acted = found["regularizer"]
        shared |= {
            "target": found["choices"]["target"] if acted else "",
            "strength": statistics.mean(acted["strength"]) if acted else "",
        }
        copied = (int(row["step"]) for row in loss if float(row["answer_accuracy"]) >= _COPIED)
        shared["copied_at"] = next(copied, "")
        shared |= {f"{part}_similarity": similarity_of(curve, part, samples=SAMPLES) for part in PARTS}
        judged_by = ("pairs", "prompt_tokens", "chance_of_first", "first", "whole")
        rows += [about | shared | {key: judged[key] for key in judged_by} for judged in found["retrieval"]]
    write(options.results / "runs.csv", rows)
    write(options.results / "similarity.csv", curves)
    write(options.results / "loss.csv", losses)
    write(options.results / "summary.csv", summarise(rows))


def losses_of(options: argparse.Namespace, run: Run) -> list[dict[str, str]]:
    """The losses of a model while it trained, and the share of answer tokens that were right."""
    with (options.work / str(run) / "loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def similarity_of(curve: list[dict[str, str]], part: str, *, samples: int) -> float:
    """Mean over the states of a part of the model, and over so many sampled steps at the end."""
    steps, last = list(dict.fromkeys(row["step"] for row in curve))[-samples:], max(int(row["state"]) for row in curve)
    chosen = {str(state) for state in PARTS[part](last)}
    return statistics.mean(
        float(row["inter_token"]) for row in curve if row["step"] in steps and row["state"] in chosen
    )


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and standard deviation over seeds, for each family, arm and context length."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["regularizer"], row["pairs"]), []).append(row)
    found: list[Row] = []
    for (family, arm, pairs), members in groups.items():
        entry: Row = {"family": family, "regularizer": arm, "pairs": pairs, "seeds": len(members)}
        entry["chance_of_first"] = members[0]["chance_of_first"]
        for name in ("text_nats", "first", "whole", "early_similarity", "late_similarity", "steps"):
            values = [float(member[name]) for member in members]
            entry |= {name: statistics.mean(values), f"{name}_std": statistics.stdev(values) if values[1:] else 0.0}
        copied = [member["copied_at"] for member in members if member["copied_at"] != ""]
        entry |= {"copied": len(copied), "copied_at": statistics.mean(copied) if copied else ""}
        found.append(entry)
    return found


def write(path: Path, rows: list[Row]) -> None:
    """Rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        )


if __name__ == "__main__":
    sys.exit(main())
