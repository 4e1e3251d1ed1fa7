"""Trains one of the models of examples/paper/README.md, watches it, and saves it as a checkpoint.

python train.py --family transformer --norms none --seconds 70 -o checkpoints/transformer-no-norms

The folder gets the model and its tokenizer, as transformers saves them; training.json, with the losses and how well
key-value pairs are retrieved; loss.csv; and run.db, the run file of the monitor.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; read when transformers is imported

import _corpus
import torch
from _kvpr import EVALUATION_SEED, judge_retrieval
from _ssd import train_by_products
from _training import CURRICULUM, Batches, Clock, Point, train, write_curve
from _variants import FAMILIES, FULL, LEARNING_RATES, TINY, TOKENS, build, variant_name
from torch.nn.functional import cross_entropy

import repflow
from repflow.monitor import Monitor, MonitorConfig, find_residual_stream
from repflow.monitor.sinks import RunFileSink

JUDGED_PAIRS = (2, 5, 9)
"""Pairs of the samples that retrieval is judged by; 5 are 285 tokens, 9 are 465."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="transformer")
    parser.add_argument("--norms", choices=("trained", "frozen", "none"), default="trained", help="of the transformer")
    parser.add_argument("--seconds", type=float, default=70, help="of training, from the end of the first step on")
    parser.add_argument("--steps", type=int, help="optimizer steps instead")
    parser.add_argument("--rows", type=int, default=32, help=f"of a batch, {TOKENS} tokens each; half of them are text")
    parser.add_argument("--learning-rate", type=float, help="the peak; 0.001, without norms 0.0005")
    parser.add_argument("--every", type=int, default=50, help="optimizer steps between snapshots of the monitor")
    parser.add_argument("--samples", type=int, default=512, help="that retrieval is judged by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder of the tokens; made if missing")
    parser.add_argument("--text", type=Path, help="folder of text; installed Python packages if left out")
    parser.add_argument("--text-mib", type=float, help="most text to read, when the corpus is made; 64, or 1 if tiny")
    parser.add_argument("--tiny", action="store_true", help="a model for trying things out on a CPU")
    parser.add_argument("-o", "--out", type=Path, help="folder of the checkpoint; checkpoints/VARIANT if left out")
    options = parser.parse_args(arguments)
    if options.norms != "trained" and options.family != "transformer":
        parser.error("--norms: expected 'trained' for ssm and hybrid: the check is of the transformer")
    options.out = options.out or Path("checkpoints") / variant_name(options.family, options.norms)
    options.learning_rate = options.learning_rate or LEARNING_RATES[options.norms]
    options.text_mib = options.text_mib or _corpus.TEXT_MIB[options.tiny]
    return options


def choices_of(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the model and how it is judged, besides its family, as plain values."""
    names = ("norms", "rows", "learning_rate", "every", "seed", "tiny", "steps", "text_mib")
    seconds = None if options.steps else options.seconds
    return {name: getattr(options, name) for name in names} | {
        "seconds": seconds,
        "evaluation_samples": options.samples,
    }


def main() -> None:
    """Train, judge and save."""
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _corpus.prepare(options.corpus, options.text_mib, options.text)
    corpus = _corpus.load(options.corpus)
    torch.manual_seed(options.seed)
    sizes, end = TINY if options.tiny else FULL, corpus.tokenizer.convert_tokens_to_ids(_corpus.END)
    assert isinstance(end, int)
    with device:
        model = build(options.family, options.norms, sizes, len(corpus.tokenizer), end).train()
    train_by_products(model)
    if device.type == "cuda":
        for block in find_residual_stream(model).blocks:
            block.module.compile(dynamic=False)  # one after another: blocks that are alike are compiled once
    name = variant_name(options.family, options.norms)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "run.db").unlink(missing_ok=True)
    config = MonitorConfig(every_n_steps=options.every)
    monitor = Monitor(model, config, sinks=[RunFileSink(options.out / "run.db")], name=name)
    clock = Clock(options.steps, None if options.steps else options.seconds)
    batches = Batches.of(corpus, options.rows, device, options.seed)
    started = time.perf_counter()
    curve = train(
        model, batches, monitor, clock, options.learning_rate, lambda text: print(f"{name}: {text}", flush=True)
    )
    monitor.close()
    took = {"seconds": clock.elapsed(), "seconds_of_first_step": clock.began - started, "steps": clock.done}
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # lengths differ
        judged = judge(model, corpus, options.samples, device)
    save(model, corpus, options, curve, took | judged)


def judge(model: Any, corpus: _corpus.Corpus, samples: int, device: torch.device) -> dict[str, Any]:
    """Loss on text that was held out, and retrieval."""
    rows = corpus.validation[: len(corpus.validation) // (TOKENS + 1) * (TOKENS + 1)].view(-1, TOKENS + 1)
    total, count = 0.0, 0
    with torch.no_grad():
        for part in rows[: 8 * samples].to(device).long().split(16):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            total += float(cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"))
            count += part[:, 1:].numel()
    loss, per_byte = total / count, len(corpus.validation) / corpus.validation_bytes
    found = [judge_retrieval(model, corpus.tokenizer, pairs, samples, device) for pairs in JUDGED_PAIRS]
    return {
        "text": {
            "nats_per_token": loss,
            "nats_per_byte": loss * per_byte,
            "nats_of_guessing": math.log(len(corpus.tokenizer)),
        },
        "retrieval": [asdict(entry) | {"chance_of_first": 1 / entry.pairs} for entry in found],
    }


def save(
    model: Any, corpus: _corpus.Corpus, options: argparse.Namespace, curve: list[Point], found: dict[str, Any]
) -> None:
    """Write checkpoint, curve and what was found, with every choice."""
    model.save_pretrained(options.out)
    corpus.tokenizer.save_pretrained(options.out)
    write_curve(options.out / "loss.csv", curve)
    about = {
        "variant": variant_name(options.family, options.norms),
        "model_class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": found["steps"] * options.rows * TOKENS,
    }
    choices = choices_of(options) | {
        "row_tokens": TOKENS, "most_pairs_until_share": [list(entry) for entry in CURRICULUM],
        "evaluation_seed": EVALUATION_SEED,
        "precision": "bfloat16 autocast" if torch.cuda.is_available() else "float32",
        "corpus": json.loads((options.corpus / "corpus.json").read_text()),
    }  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"repflow": repflow.__version__} | {
        name: version(name) for name in ("torch", "transformers", "tokenizers")
    }
    whole = (
        about | found | {"choices": choices, "device": device, "python": sys.version.split()[0], "versions": versions}
    )
    (options.out / "training.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    retrieved = ", ".join(f"{entry['whole']:.0%} of {entry['pairs']}" for entry in found["retrieval"])
    print(
        f"{about['variant']}: text {found['text']['nats_per_token']:.3f} nats per token, pairs retrieved: {retrieved}"
    )
    print(f"run file: {options.out / 'run.db'}")


if __name__ == "__main__":
    main()
