"""`repflow tasks`: what the tasks look like for a tokenizer, as text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from repflow.monitor.offline import BeyondWindowError, OfflineError
from repflow.monitor.offline.tasks import AbstractTask
from repflow.monitor.offline.tasks_data import load_questions
from repflow.monitor.offline.tasks_kvpr import KeyValueRetrieval
from repflow.monitor.offline.tasks_length import (
    LENGTHS,
    PromptEncoder,
    encode_samples,
    fit_items,
    parse_length,
    shared_window,
)
from repflow.monitor.offline.tasks_mdqa import MultiDocumentQA

TASKS = ("kvpr", "mdqa")
_SHOWN_LINES = 6  # of a prompt, at its beginning and again at its end
_SHOWN_LETTERS = 160  # of a line


@dataclass(frozen=True, kw_only=True)
class TaskChoices:
    """What samples to show.

    Raises:
        OfflineError: an unknown task, or neither a tokenizer nor a number of items.
    """

    tasks: Sequence[str] = TASKS
    lengths: Sequence[str] = LENGTHS[:1]
    tokenizer: str | None = None
    """Where the tokenizer is, and the model's window: a folder, or `owner/name` on the hub."""
    items: int | None = None
    """Pairs or documents, instead of a length."""
    samples: int = 1
    seed: int = 0
    classes: int | None = None
    """Tested positions; see `AbstractTask.classes`."""
    data: Path | None = None
    """Questions for MDQA; those of the paper if None."""
    whole: bool = False
    """Show prompts whole."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise OfflineError(f"TASK: expected {' or '.join(TASKS)}, got {unknown[0]!r}")
        if self.samples < 1:
            raise OfflineError(f"--samples: expected 1 or more, got {self.samples}")
        if self.tokenizer is None and self.items is None:
            raise OfflineError(
                "expected --tokenizer NAME_OR_PATH, to find how many items make --length tokens, or --items NUMBER"
            )


def make_task(name: str, *, seed: int = 0, data: Path | None = None) -> Callable[[int], AbstractTask]:
    """From a number of items to the task of this name.

    Classes are not among what it is made from: to find the number of items, tasks of two items are looked at too.
    """
    if name == "kvpr":
        return lambda items: KeyValueRetrieval(items=items, seed=seed)
    questions = load_questions(data)
    return lambda items: MultiDocumentQA(questions, items=items, seed=seed)


def show_tasks(choices: TaskChoices, console: Console) -> None:
    """Print samples of the tasks.

    Raises:
        OfflineError: see `TaskChoices`, `load_questions`, `load_tokenizer` and `fit_items`.
    """
    encoder, window = (None, None) if choices.tokenizer is None else _encoder(choices.tokenizer)
    for name in choices.tasks:
        make = make_task(name, seed=choices.seed, data=choices.data)
        if choices.items is not None:
            _show(replace(make(choices.items), classes=choices.classes), encoder, choices, console)
            continue
        assert encoder is not None
        for length in choices.lengths:
            tokens = parse_length(length)
            try:
                task = fit_items(make, tokens, encoder, window)
            except BeyondWindowError as error:
                console.print(Text(f"{name}: {error}", style="yellow"), soft_wrap=True)
                continue
            task = replace(task, classes=choices.classes)
            _show(task, encoder, choices, console, length, shared_window(tokens, window))


def _encoder(name: str) -> tuple[PromptEncoder, int | None]:
    from repflow.monitor.offline.loading import load_config, load_tokenizer, window_of

    encoder = PromptEncoder(load_tokenizer(name))
    try:
        return encoder, window_of(load_config(name))
    except OfflineError:  # a tokenizer that lies by itself
        return encoder, None


def _show(
    task: AbstractTask,
    encoder: PromptEncoder | None,
    choices: TaskChoices,
    console: Console,
    length: str | None = None,
    limit: int | None = None,
) -> None:
    wanted = f" for about {parse_length(length):,} tokens" if length else ""
    title = f"{task.name}: {task.items} {task.unit}{wanted}"
    positions = ", ".join(map(str, task.positions))
    console.print(Text(title, style="bold"), Text(f"; gold at {positions}; seed {task.seed}"), sep="", soft_wrap=True)
    encoded = None if encoder is None else encode_samples(task, choices.samples, encoder, limit or 10**9)
    for index in range(choices.samples):
        sample = task.sample(index, 0 if encoded is None else int(encoded.attempts[index]))
        tokens = "" if encoded is None else f", {len(encoded.ids[index]):,} tokens"
        head = f"sample {index}: gold at {sample.position}, class {sample.label}{tokens}"
        console.print(Text(head, style="cyan"), soft_wrap=True)
        for line in sample.prompt.splitlines() if choices.whole else _excerpt(sample.prompt):
            console.print(Text(f"  {line}"), soft_wrap=True)
        console.print(Text(f"  → {sample.answer}", style="green"), soft_wrap=True)


def _excerpt(prompt: str) -> Iterator[str]:
    """The ends of a prompt."""
    lines = [line if len(line) <= _SHOWN_LETTERS else f"{line[:_SHOWN_LETTERS]} …" for line in prompt.splitlines()]
    if len(lines) <= 2 * _SHOWN_LINES + 1:
        yield from lines
    else:
        yield from lines[:_SHOWN_LINES]
        yield f"… {len(lines) - 2 * _SHOWN_LINES} lines …"
        yield from lines[-_SHOWN_LINES:]
