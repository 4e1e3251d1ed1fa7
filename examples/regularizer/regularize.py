"""Trains one model of examples/paper with the regularizer or without, and measures what that changes.

python regularize.py --family transformer --strength controlled --seed 0 --seconds 300 -o work/transformer-with-0

The folder gets similarity.csv, the similarity of every state at every sampled step; loss.csv; result.json, with the
loss on text that was held out, retrieval by context length, and every choice; and run.db, the run file of the monitor.
Text, key-value pairs, models and the loop's parts are those of examples/paper.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "paper"))

import _corpus
import torch
from _ssd import train_by_products
from _training import CURRICULUM, EVERY, Batches, Clock, Point, losses, optimizer_of, rate_factor, write_curve
from _variants import FAMILIES, FULL, LEARNING_RATES, TINY, TOKENS, build
from train import judge

from repflow.callbacks import DualAscent, RepresentationRegularizer
from repflow.monitor import Monitor, MonitorConfig, find_residual_stream, open_run
from repflow.monitor.sinks import RunFileSink

PARTS = {"early": lambda last: range(1, last // 3 + 1), "late": lambda last: range(last - last // 3 + 1, last + 1)}
"""The states that the term acts on: the first third of a model's, or the last."""
CHOSEN = {"transformer": ("early",), "ssm": ("late",), "hybrid": ("early", "late")}
"""Where the paper sees tokens become alike: early in transformers, late in state-space models."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="transformer")
    parser.add_argument("--strength", default="controlled", help="'none', 'controlled', or a number for a fixed λ")
    parser.add_argument("--target", type=float, default=0.2, help="the similarity above which the term acts")
    parser.add_argument("--maximum", type=float, default=1.0, help="most λ of the controller")
    parser.add_argument("--layers", nargs="+", choices=PARTS, help="early, late or both; if left out, by family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300, help="of training, from the end of the first step on")
    parser.add_argument("--steps", type=int, help="optimizer steps instead: the same tokens")
    parser.add_argument("--rows", type=int, default=32, help=f"of a batch, {TOKENS} tokens each; half of them are text")
    parser.add_argument("--every", type=int, default=50, help="optimizer steps between snapshots of the monitor")
    parser.add_argument("--samples", type=int, default=512, help="that retrieval is judged by")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder of the tokens; made if missing")
    parser.add_argument("--text", type=Path, help="folder of text; installed Python packages if left out")
    parser.add_argument("--text-mib", type=float, help="most text to read, when the corpus is made; 64, or 1 if tiny")
    parser.add_argument("--tiny", action="store_true", help="a model for trying things out on a CPU")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.text_mib = options.text_mib or _corpus.TEXT_MIB[options.tiny]
    options.layers = options.layers or list(CHOSEN[options.family])
    if options.strength not in ("none", "controlled"):
        try:
            options.strength = float(options.strength)
        except ValueError:
            parser.error(f"--strength: expected 'none', 'controlled' or a number, got {options.strength!r}")
    return options


def choices_of(options: argparse.Namespace) -> dict[str, Any]:
    """Every choice, as plain values."""
    return {key: value if not isinstance(value, Path) else value.name for key, value in vars(options).items()}


def main() -> None:
    """Train, judge and write."""
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _corpus.prepare(options.corpus, options.text_mib, options.text)
    corpus = _corpus.load(options.corpus)
    torch.manual_seed(options.seed)
    end = corpus.tokenizer.convert_tokens_to_ids(_corpus.END)
    assert isinstance(end, int)
    with device:
        model = build(options.family, "trained", TINY if options.tiny else FULL, len(corpus.tokenizer), end).train()
    train_by_products(model)
    blocks = find_residual_stream(model).blocks
    if device.type == "cuda":
        for block in blocks:
            block.module.compile(dynamic=False)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "run.db").unlink(missing_ok=True)
    name = options.out.name
    config = MonitorConfig(every_n_steps=options.every, metrics=("inter_token", "adjacent", "variation"))
    monitor = Monitor(model, config, sinks=[RunFileSink(options.out / "run.db")], name=name)
    regularizer = regularizer_of(options, monitor, len(blocks))
    if regularizer is not None:
        regularizer.attach(model)
    clock = Clock(options.steps, None if options.steps else options.seconds)
    batches = Batches.of(corpus, options.rows, device, options.seed)
    curve = train(model, batches, monitor, regularizer, clock, LEARNING_RATES["trained"])
    strength = None if regularizer is None else regularizer.state_dict()
    if regularizer is not None:
        regularizer.detach()
    monitor.close()
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # lengths differ
        judged = judge(model, corpus, options.samples, device)
    write_curve(options.out / "loss.csv", curve)
    write_similarity(options.out)
    taken = {"steps": clock.done, "seconds": clock.elapsed(), "tokens": clock.done * options.rows * TOKENS}
    found = {"name": name, **taken, **judged, "regularizer": strength, "choices": choices_of(options)}
    (options.out / "result.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{name}: text {judged['text']['nats_per_token']:.3f} nats per token after {clock.done} steps")


def regularizer_of(options: argparse.Namespace, monitor: Monitor, last: int) -> RepresentationRegularizer | None:
    """The regularizer that the command line asks for."""
    if options.strength == "none":
        return None
    layers = sorted({layer for part in options.layers for layer in PARTS[part](last)})
    strength: Any = DualAscent(maximum=options.maximum) if options.strength == "controlled" else options.strength
    return RepresentationRegularizer(options.target, layers, strength=strength, monitor=monitor)


def train(
    model: Any,
    batches: Batches,
    monitor: Monitor,
    regularizer: RepresentationRegularizer | None,
    clock: Clock,
    learning_rate: float,
    say: Callable[[str], None] = print,
) -> list[Point]:
    """Train until the clock has run out; the curve. Like the loop of examples/paper, but for the lines that act."""
    optimizer, device = optimizer_of(model, learning_rate), batches.text.device
    curve: list[Point] = []
    window: list[torch.Tensor] = []
    while (share := clock.share()) < 1:
        pairs = next(most for until, most in CURRICULUM if share < until)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_factor(share)
        rows = batches.draw(pairs)
        mask = rows.real[:, :-1]
        precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with monitor.step(clock.done, mask=mask), precision:
            loss, seen = losses(model, rows)
            if regularizer is not None:
                regularizer.follow(loss, mask=mask)
            loss.backward()
        monitor.log(loss=loss, text_loss=seen[0], answer_loss=seen[1], answer_accuracy=seen[2])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if regularizer is not None:
            regularizer.step()
        window.append(seen)
        clock.tick(device)
        if clock.done % EVERY == 0:
            text, answer, accuracy = torch.stack(window).mean(0).tolist()
            curve.append(
                Point(
                    step=clock.done, seconds=clock.elapsed(), text_loss=text, answer_loss=answer,
                    answer_accuracy=accuracy, pairs=pairs, learning_rate=optimizer.param_groups[0]["lr"],
                )
            )  # fmt: skip
            window = []
            say(f"{share:4.0%}  step {clock.done}: text {text:.3f}, answers {answer:.3f} ({accuracy:.0%} right)")
    return curve


def write_similarity(folder: Path) -> None:
    """The similarity of every state at every sampled step, from the run file."""
    with open_run(folder / "run.db") as run, (folder / "similarity.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "state", "inter_token", "update_inter_token"])
        for step, similarity, updates in zip(
            run.step.values, run.inter_token.values, run.update_inter_token.values, strict=True
        ):
            for state, value in enumerate(similarity):
                update = f"{updates[state - 1]:.6f}" if state else ""
                writer.writerow([int(step), state, f"{value:.6f}", update])


if __name__ == "__main__":
    main()
