"""Trains the five models, as many at once as there are GPUs, and makes figures and tables of the paper on them.

python run.py --steps 2000 --work paper-work --results examples/paper/results

The work folder gets the text as tokens, checkpoints, logs, and what is measured; gigabytes. The results folder gets
what is small: data of figures and tables, and of each model its losses and its retrieval. A model that is there
already, whole, is not trained again; one that was made with other options is not taken for it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import _corpus
import torch
from _kept import is_there
from _variants import Norms, variant_name
from train import choices_of
from train import parse as parse_training

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
KEPT = ("training.json", "loss.csv")
"""Of a checkpoint's folder."""


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known here is for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further options are passed on to train.py, such as --rows 32 or --steps 100.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds",
        nargs="+",
        default=["70"],
        metavar="[VARIANT=]SECONDS",
        help="of training, of each model or of one; 70 if left out",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to train")
    parser.add_argument("--targets", nargs="*", default=TARGETS, help="what to measure; nothing after it: nothing")
    parser.add_argument("--lengths", nargs="+", default=["300", "480"], help="of prompts: 5 and 9 pairs")
    parser.add_argument("--prompts", type=int, default=4096, help="of each length, to measure on")
    parser.add_argument("--processes", type=int, help="that share the measuring; one for each GPU if left out")
    parser.add_argument("--text", type=Path, help="folder of text; installed Python packages if left out")
    parser.add_argument("--text-mib", type=float, help="most text to read; 64, or 1 if tiny")
    parser.add_argument("--tiny", action="store_true", help="models for trying things out on a CPU")
    parser.add_argument("--work", type=Path, help="paper-work, or paper-work-tiny, if left out")
    parser.add_argument("--results", type=Path, help="results beside this file, or in the work folder if tiny")
    options, passed = parser.parse_known_args()
    try:
        options.seconds = number_by_name(options.seconds, VARIANTS, 70.0)
    except ValueError as error:
        parser.error(f"--seconds: {error}")
    settle(options, Path("paper-work"), HERE / "results")
    return options, passed + text_of(options)


def number_by_name(words: list[str], names: Collection[str], default: float) -> dict[str, float]:
    """From `70 ssm=190` to the number of each name.

    Raises:
        ValueError: a word that is neither, or another name.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if name and name not in names:
            raise ValueError(f"expected one of {', '.join(names)} before '=', got {name!r}")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"expected a number, or NAME=NUMBER, got {word!r}") from None
    return {name: found.get(name, found.get("", default)) for name in names}


def settle(options: argparse.Namespace, work: Path, results: Path) -> None:
    """Fill in what was left out: a trial on tiny models has places of its own, away from what is published."""
    options.text_mib = options.text_mib or _corpus.TEXT_MIB[options.tiny]
    options.work = options.work or (work.with_name(f"{work.name}-tiny") if options.tiny else work)
    options.results = options.results or (options.work / "results" if options.tiny else results)


def text_of(options: argparse.Namespace) -> list[str]:
    """What the processes that train must be told, too."""
    text = ["--text", str(options.text)] if options.text else []
    return ["--text-mib", str(options.text_mib), *text, *(["--tiny"] if options.tiny else [])]


def main() -> int:
    """Train, measure, and keep the results; 0 if nothing failed."""
    options, passed = parse()
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {text}", flush=True)

    there = {name: is_trained(name, options, passed) for name in options.variants}
    _corpus.prepare(options.work / "corpus", options.text_mib, options.text)
    say("text is there")
    gpus = torch.cuda.device_count()
    free: Queue[int | None] = Queue()
    for gpu in range(gpus) if gpus else [None]:
        free.put(gpu)

    def one(name: str) -> bool:
        gpu = free.get()
        try:
            done = there[name] or train(name, options, passed, gpu)
        finally:
            free.put(gpu)
        say(f"{name}: {'trained' if done else f'failed; see {log_of(options, name)}'}")
        return done

    with ThreadPoolExecutor(max(1, gpus)) as pool:
        trained = [name for name, done in zip(options.variants, pool.map(one, options.variants), strict=True) if done]
    for name in trained:
        keep(folder_of(name, options), options.results / name, KEPT)
    if trained and options.targets:
        if not measure(trained, options, options.processes or max(1, gpus)):
            say(f"measuring failed; see {log_of(options, 'reproduce')}")
            return 1
        say(f"measured; results are in {options.results}")
    return int(len(trained) < len(options.variants))


def is_trained(name: str, options: argparse.Namespace, passed: list[str]) -> bool:
    """Whether a model is there, as it is asked for; see `is_there`."""
    asked = choices_of(parse_training(arguments_of(name, options, passed)))
    return is_there(folder_of(name, options) / "training.json", asked)  # written last


def train(name: str, options: argparse.Namespace, passed: list[str], gpu: int | None) -> bool:
    """Train a model in a process of its own, on one GPU."""
    command = [sys.executable, HERE / "train.py", *arguments_of(name, options, passed)]
    environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible(gpu)}
    return call(command, log_of(options, name), environment)


def arguments_of(name: str, options: argparse.Namespace, passed: list[str]) -> list[str]:
    """What train.py is told."""
    family, norms = VARIANTS[name]
    arguments = ["--family", family, "--norms", norms, "--seconds", options.seconds[name]]
    arguments += ["--corpus", options.work / "corpus", "-o", folder_of(name, options)]
    return [*map(str, arguments), *passed]


def folder_of(name: str, options: argparse.Namespace) -> Path:
    """The checkpoint of a model."""
    return options.work / "checkpoints" / name


def visible(gpu: int) -> str:
    """The name of a GPU, where some of them are hidden from this process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[gpu] if named else str(gpu)


def measure(names: list[str], options: argparse.Namespace, processes: int) -> bool:
    """Make the targets on all models together, so that each figure shows them side by side."""
    folder = options.work / "reproduced"
    models = [part for name in names for part in ("--model", folder_of(name, options))]
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
