"""Trains transformer, state-space model and hybrid with the regularizer and without, and gathers what is seen.

python compare.py --seconds 300 --work regularizer-work --results examples/regularizer/results

As many models train at once as there are GPUs. The results folder gets runs.csv, one row for each model and context
length; similarity.csv, the similarity by depth and step of each; and summary.csv, means and standard deviations over
seeds. A model whose result is there already is not trained again.
"""

import argparse
import csv
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "paper"))

import _corpus
import torch
from regularize import PARTS
from run import call, visible

HERE = Path(__file__).resolve().parent
FAMILIES = ("ssm", "hybrid", "transformer")
"""The slowest to compile first."""
ARMS = {"without": "none", "with": "controlled"}

Row = dict[str, Any]


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known here is for regularize.py."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further options are passed on to regularize.py, such as --target 0.2, --steps 2000 or --tiny.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=300, help="of training, of each model")
    parser.add_argument("--text", type=Path, help="folder of text; installed Python packages if left out")
    parser.add_argument("--text-mib", type=float, default=64, help="most text to read")
    parser.add_argument("--work", type=Path, default=Path("regularizer-work"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser.parse_known_args()


def main() -> int:
    """Train all of them and gather the results; 0 if nothing failed."""
    options, passed = parse()
    _corpus.prepare(options.work / "corpus", options.text_mib, options.text)
    gpus = torch.cuda.device_count()
    free: Queue[int | None] = Queue()
    for gpu in range(gpus) if gpus else [None]:
        free.put(gpu)

    def one(run: tuple[int, str, str]) -> bool:
        gpu = free.get()
        try:
            done = train(run, options, passed, gpu)
        finally:
            free.put(gpu)
        print(f"{name_of(run)}: {'trained' if done else f'failed; see {log_of(options, run)}'}", flush=True)
        return done

    runs = [(seed, family, arm) for seed in options.seeds for family in options.families for arm in ARMS]
    with ThreadPoolExecutor(max(1, gpus)) as pool:
        trained = [run for run, done in zip(runs, pool.map(one, runs), strict=True) if done]
    if trained:
        gather(trained, options)
    return int(len(trained) < len(runs))


def name_of(run: tuple[int, str, str]) -> str:
    """What a run is called, such as `ssm-with-0`."""
    seed, family, arm = run
    return f"{family}-{arm}-{seed}"


def log_of(options: argparse.Namespace, run: tuple[int, str, str]) -> Path:
    """Where its process writes what it has to say."""
    return options.work / "logs" / f"{name_of(run)}.log"


def train(run: tuple[int, str, str], options: argparse.Namespace, passed: list[str], gpu: int | None) -> bool:
    """Train one model in a process of its own, on one GPU."""
    folder = options.work / name_of(run)
    if (folder / "result.json").exists():  # written last
        return True
    seed, family, arm = run
    arguments = ["--family", family, "--strength", ARMS[arm], "--seed", seed, "--seconds", options.seconds]
    corpus = ["--corpus", options.work / "corpus", "-o", folder]
    command = [sys.executable, HERE / "regularize.py", *arguments, *corpus, *passed]
    return call(command, log_of(options, run), {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible(gpu)})


def gather(runs: list[tuple[int, str, str]], options: argparse.Namespace) -> None:
    """Write the three tables."""
    options.results.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    curves: list[Row] = []
    for seed, family, arm in runs:
        folder = options.work / name_of((seed, family, arm))
        about = {"family": family, "regularizer": arm, "seed": seed}
        found = json.loads((folder / "result.json").read_text())
        with (folder / "similarity.csv").open(newline="") as file:
            curve = list(csv.DictReader(file))
        curves += [about | row for row in curve]
        shared = {"text_nats": found["text"]["nats_per_token"], "steps": found["steps"], "seconds": found["seconds"]}
        shared |= {f"{part}_similarity": last_similarity(curve, part) for part in PARTS}
        rows += [
            about | shared | {key: judged[key] for key in ("pairs", "prompt_tokens", "first", "whole")}
            for judged in found["retrieval"]
        ]
    write(options.results / "runs.csv", rows)
    write(options.results / "similarity.csv", curves)
    write(options.results / "summary.csv", summarise(rows))


def last_similarity(curve: list[dict[str, str]], part: str) -> float:
    """Mean over the states of a part of the model, at the last sampled step."""
    step, last = curve[-1]["step"], max(int(row["state"]) for row in curve)
    chosen = {str(state) for state in PARTS[part](last)}
    values = [float(row["inter_token"]) for row in curve if row["step"] == step and row["state"] in chosen]
    return sum(values) / len(values)


def summarise(rows: list[Row]) -> list[Row]:
    """Mean and standard deviation over seeds, for each family, arm and context length."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["regularizer"], row["pairs"]), []).append(row)
    found: list[Row] = []
    for (family, arm, pairs), members in groups.items():
        entry: Row = {"family": family, "regularizer": arm, "pairs": pairs, "seeds": len(members)}
        for name in ("text_nats", "first", "whole", "early_similarity", "late_similarity", "steps"):
            values = [float(member[name]) for member in members]
            entry |= {name: statistics.mean(values), f"{name}_std": statistics.stdev(values) if values[1:] else 0.0}
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
