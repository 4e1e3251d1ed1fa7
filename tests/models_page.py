"""docs/models.md, from what `tests.matrix` finds.

`python -m tests.models_page` writes it; with `--check` it only says whether it is up to date.
"""

import sys
import warnings
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import torch
import transformers

from tests.architectures import ARCHITECTURES
from tests.matrix import STEPS, Result, examine

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

INTRODUCTION = """\
# Models

Written by `python -m tests.models_page` with transformers {version}, from the models themselves; a test compares. Each
is tiny and random, and is trained for {steps} steps on the CPU, on batches with padding on the left and on the right,
with the monitor on every step and without it, with activation checkpointing and without.

- **blocks**: where the list of blocks is, and what each is made of. A block with two parts that mix tokens is of the
  kind `hybrid`; otherwise its kind is its mixer (`attention`, `ssm`, `recurrent`, `conv`), or else what it has instead.
- **returns**: what the blocks return. The state is the tensor, or the first of the tuple; in mamba_ssm the sum of both.
- **states**: h^(0..L) are bit for bit what hooks of one's own see in a forward of their own, and each block took what
  the one before it had returned.
- **losses**: bit for bit those without the monitor.
- **snapshot**: every published value is finite, and exactly the tokens that are not padding were measured.
- **checkpointing**: the same three with activation checkpointing; a dash where the model offers none.
- **`output_hidden_states`**: what transformers returns, found by comparing it bit for bit with the states of the same
  forward in the convention `states="hf"`. A list that begins with h1 is shifted by one against the others: compare by
  number, not by place. A dash: not a class of transformers.

"""

NOTES = """
What to know besides:

- **Encoder-decoders** have two streams: `stream="encoder"` or `stream="decoder"` says which, and the error lists them.
  Padding of the decoder is what `decoder_attention_mask` says; without it, what is behind the last of `labels` that is
  not −100, since models make the decoder's input of them.
- **Blocks skipped at random**, as by LayerDrop, or left early: only forwards through all blocks are recorded. A probe
  batch is measured in evaluation mode, in which all of them run ([probe.md](probe.md)).
- **Models of several modalities**: lists under names such as `vision_tower` are passed over unless `stream=` or
  `blocks=` names them.
- **The order of the blocks** is held against the first forward that is recorded. Where a block does not take what the
  one before it returned, a warning names both, and the step is left out. Models that run their blocks several times
  need `blocks=[...]`, each as often as it runs.
- **Without a final norm**, as in Bert, there is no `states="hf"`: `states="residual"` is what transformers returns.
- **T5** puts dropout behind the final norm, so that with dropout its last entry is not reproduced by `states="hf"`.
- **torch.nn.TransformerEncoder** leaves its fast path while hooks are on its layers. It never takes it in training; an
  evaluation inside of a sampled step gives results that differ by rounding from those outside.
- **mamba_ssm**: see [mamba_ssm.md](mamba_ssm.md).

`repflow inspect MODEL_OR_CONFIG` shows the same of any model, without memory for its weights where that is possible.
"""

HEADINGS = ("model", "blocks", "returns", "states", "losses", "snapshot", "checkpointing", "`output_hidden_states`")


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` compare it."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = page(map(examine, ARCHITECTURES))
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is not what the models say; run: python -m tests.models_page")
        return 1
    return 0


def page(results: Iterable[Result]) -> str:
    """The page, from all results."""
    version = transformers.__version__
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(row(result, version) for result in results)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return INTRODUCTION.format(version=version, steps=STEPS) + table + NOTES


def row(result: Result, version: str) -> list[str]:
    if result.missing:
        return [result.name, f"transformers {version} has no {result.missing}", *["–"] * (len(HEADINGS) - 2)]
    assert result.plain is not None
    plain, again = result.plain, result.checkpointed
    return [
        result.name,
        f"`{result.path}`: {', '.join(together(result.parts))}",
        result.returns,
        say(plain.states),
        say(plain.losses),
        say(plain.snapshot and plain.padding),
        "–" if again is None else say(all(vars(again).values())),
        result.hidden_states or "–",
    ]


def together(parts: Iterable[str]) -> list[str]:
    """Equal neighbours as one: `2 × ssm`."""
    counts = [(part, len(list(equal))) for part, equal in groupby(parts)]
    return [part if count == 1 else f"{count} × {part}" for part, count in counts]


def say(good: bool) -> str:
    return "yes" if good else "**no**"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
