"""Trains the five models, as many at once as there are GPUs, and makes figures and tables of the paper on them.

python run.py --seconds 70 --work paper-work --results examples/paper/results

The work folder gets the text as tokens, checkpoints, logs, and what is measured; gigabytes. The results folder gets
what is small: data of figures and tables, and of each model its losses, its retrieval and its run file. A model that
is there already, whole, is not trained again.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import _corpus
import torch
from _variants import Norms, variant_name

HERE = Path(__file__).resolve().parent
_TRAINED: tuple[tuple[str, Norms], ...] = (
    ("ssm", "trained"),  # the slowest to compile first
    ("hybrid", "trained"),
    ("transformer", "trained"),
    ("transformer", "frozen"),
    ("transformer", "none"),
)
VARIANTS = {variant_name(family, norms): (family, norms) for family, norms in _TRAINED}
TARGETS = ("figure1", "figure2", "figure4", "table1", "table2")
KEPT = ("training.json", "loss.csv", "run.db")
"""Of a checkpoint's folder."""


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known here is for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further options are passed on to train.py, such as --rows 32, --steps 100 or --tiny.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seconds", type=float, default=70, help="of training, of each model")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to train")
    parser.add_argument("--targets", nargs="*", default=TARGETS, help="what to measure; nothing after it: nothing")
    parser.add_argument("--lengths", nargs="+", default=["300", "480"], help="of prompts: 5 and 9 pairs")
    parser.add_argument("--prompts", type=int, default=4096, help="of each length, to measure on")
    parser.add_argument("--processes", type=int, help="that share the measuring; one for each GPU if left out")
    parser.add_argument("--text", type=Path, help="folder of text; installed Python packages if left out")
    parser.add_argument("--text-mib", type=float, default=64, help="most text to read")
    parser.add_argument("--work", type=Path, default=Path("paper-work"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser.parse_known_args()


def main() -> int:
    """Train, measure, and keep the results; 0 if nothing failed."""
    options, passed = parse()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {text}", flush=True)

    _corpus.prepare(options.work / "corpus", options.text_mib, options.text)
    say("text is there")
    gpus = torch.cuda.device_count()
    free: Queue[int | None] = Queue()
    for gpu in range(gpus) if gpus else [None]:
        free.put(gpu)

    def one(name: str) -> bool:
        gpu = free.get()
        try:
            done = train(name, options, passed, gpu)
        finally:
            free.put(gpu)
        say(f"{name}: {'trained' if done else f'failed; see {log_of(options, name)}'}")
        return done

    with ThreadPoolExecutor(max(1, gpus)) as pool:
        trained = [name for name, done in zip(options.variants, pool.map(one, options.variants), strict=True) if done]
    for name in trained:
        keep(options.work / "checkpoints" / name, options.results / name, KEPT)
    if trained and options.targets:
        if not measure(trained, options, options.processes or max(1, gpus)):
            say(f"measuring failed; see {log_of(options, 'reproduce')}")
            return 1
        say(f"measured; results are in {options.results}")
    return int(len(trained) < len(options.variants))


def train(name: str, options: argparse.Namespace, passed: list[str], gpu: int | None) -> bool:
    """Train a model in a process of its own, on one GPU."""
    folder = options.work / "checkpoints" / name
    if (folder / "training.json").exists():  # written last
        return True
    family, norms = VARIANTS[name]
    arguments = ["--family", family, "--norms", norms, "--seconds", options.seconds, "-o", folder]
    command = [sys.executable, HERE / "train.py", *arguments, "--corpus", options.work / "corpus", *passed]
    environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible(gpu)}
    return call(command, log_of(options, name), environment)


def visible(gpu: int) -> str:
    """The name of a GPU, where some of them are hidden from this process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[gpu] if named else str(gpu)


def measure(names: list[str], options: argparse.Namespace, processes: int) -> bool:
    """Make the targets on all models together, so that each figure shows them side by side."""
    folder = options.work / "reproduced"
    models = [part for name in names for part in ("--model", options.work / "checkpoints" / name)]
    lengths = [part for length in options.lengths for part in ("--length", length)]
    arguments = ["reproduce", *options.targets, *models, *lengths, "--samples", options.prompts]
    arguments += ["--task", "kvpr", "--no-pictures", "-o", folder]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "repflow", *arguments]
    done = call(command, log_of(options, "reproduce"), {})
    keep(folder, options.results, [f"{name}.{kind}" for name in options.targets for kind in ("csv", "json", "npz")])
    return done


def call(command: list[object], log: Path, environment: dict[str, str]) -> bool:
    """Run a command, with all that it says in a file; whether it ended well."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([str(part) for part in command], stdout=file, stderr=file, env=os.environ | environment)
    return done.returncode == 0


def log_of(options: argparse.Namespace, name: str) -> Path:
    """Where a process writes what it has to say."""
    return options.work / "logs" / f"{name}.log"


def keep(source: Path, target: Path, names: list[str] | tuple[str, ...]) -> None:
    """Copy files of these names, those that there are."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    sys.exit(main())
