"""Trains one model of the demo under the monitor."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from rich.console import Console
from torch.utils.data import DataLoader, Subset

from repflow.callbacks import RepresentationMonitor
from repflow.monitor.demo.language_model import ByteLanguageModel
from repflow.monitor.demo.models import DemoModel, Recipe
from repflow.monitor.demo.options import Demo
from repflow.monitor.demo.progress import TrainingProgress
from repflow.monitor.demo.summary import last_attempt
from repflow.monitor.demo.text import ByteWindows, Corpus
from repflow.monitor.demo.tracking import Tracking, start_tracking
from repflow.monitor.sinks import RunFileSink

VALIDATION_SEQUENCES = 16
"""Held-out sequences, spread evenly, on which the loss is taken before and after training."""


@dataclass(kw_only=True)
class Outcome:
    """How the training of one model went."""

    model: DemoModel
    run_file: Path
    """Holds the snapshots, also those of a training that was cut off."""
    attempt: int = 1
    """Number of its attempt in the run file; lower ones are of earlier demos."""
    tracking: Tracking | None = None
    steps: int = 0
    """Optimizer steps taken."""
    seconds: float = 0.0
    """Wall time of the training loop, monitoring included."""
    first_loss: float | None = None
    """Validation loss before the first step, in nats per byte; None if it was not reached."""
    last_loss: float | None = None
    """Validation loss after the last step."""
    error: Exception | None = None
    """What ended the training."""
    interrupted: bool = False
    """Whether the user did."""


def device_name() -> str:
    """What the models train on, in words."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"


def train(model: DemoModel, demo: Demo, corpus: Corpus, console: Console) -> Outcome:
    """Train and monitor one model. Failures and Ctrl-C end up in the outcome."""
    outcome = Outcome(model=model, run_file=demo.run_file(model))
    with _quiet_libraries():
        with _noting(outcome):
            outcome.attempt = last_attempt(outcome.run_file) + 1
            outcome.tracking = start_tracking(model.name, folder=demo.folder)
            _fit(outcome, demo, corpus, console)
        with _noting(outcome):
            if outcome.tracking is not None:
                outcome.tracking.finish(failed=outcome.interrupted or outcome.error is not None)
    return outcome


@contextmanager
def _noting(outcome: Outcome) -> Iterator[None]:
    """Let what ends a training go no further than into its outcome."""
    try:
        yield
    except KeyboardInterrupt:
        outcome.interrupted = True
    except Exception as error:
        outcome.error = outcome.error or error  # the first one is the cause


def _fit(outcome: Outcome, demo: Demo, corpus: Corpus, console: Console) -> None:
    L.seed_everything(demo.seed, verbose=False)
    recipe, timer = demo.recipe, Timer()
    module = ByteLanguageModel(outcome.model.build(), learning_rate=recipe.learning_rate, steps=demo.steps)
    monitor = RepresentationMonitor(
        every_n_steps=demo.every_n_steps, name=outcome.model.name, sinks=[RunFileSink(outcome.run_file)]
    )
    with TrainingProgress(console, label=outcome.model.name, steps=demo.steps) as progress:
        trainer = _trainer(demo, [monitor, timer, progress], outcome.tracking)
        validation = _validation_loader(corpus, recipe)
        try:
            with _interruptible():
                outcome.first_loss = _validate(trainer, module, validation)
                trainer.fit(module, _training_loader(corpus, recipe, demo.seed))
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            outcome.steps, outcome.seconds = trainer.global_step, timer.time_elapsed("train")
        if outcome.steps:
            with _interruptible():
                outcome.last_loss = _validate(trainer, module, validation)


def _trainer(demo: Demo, callbacks: list[L.Callback], tracking: Tracking | None) -> L.Trainer:
    cuda = torch.cuda.is_available()
    return L.Trainer(
        accelerator="cuda" if cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if cuda and torch.cuda.is_bf16_supported() else "32-true",
        max_steps=demo.steps,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=tracking.logger if tracking is not None and tracking.logger is not None else False,
        log_every_n_steps=1,
        default_root_dir=demo.folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def _validate(trainer: L.Trainer, module: ByteLanguageModel, loader: DataLoader) -> float:
    return trainer.validate(module, loader, verbose=False)[0]["val_loss"]


def _training_loader(corpus: Corpus, recipe: Recipe, seed: int) -> DataLoader:
    windows = ByteWindows(corpus.train, recipe.sequence)
    order = torch.Generator().manual_seed(seed)
    return DataLoader(windows, recipe.batch, shuffle=True, drop_last=True, generator=order)


def _validation_loader(corpus: Corpus, recipe: Recipe) -> DataLoader:
    windows = ByteWindows(corpus.validation, recipe.sequence)
    count = min(VALIDATION_SEQUENCES, len(windows))
    chosen = [index * len(windows) // count for index in range(count)]
    return DataLoader(Subset(windows, chosen), recipe.batch)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C a `KeyboardInterrupt` again: Lightning turns it into `SystemExit` and leaves the signal ignored."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        # Signals can be handled in the main thread alone, and Lightning changes nothing elsewhere.
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


_CHATTER = (
    ".*does not have many workers",  # windows are cut from memory: workers would gain nothing
    ".*but have no `val_dataloader`",  # the validation loss is taken before and after fitting
    ".*isinstance\\(treespec, LeafSpec\\)` is deprecated",  # between Lightning and PyTorch
)
_LOGGERS = {"lightning.pytorch": logging.WARNING, "lightning.fabric": logging.WARNING, "transformers": logging.ERROR}


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep what says nothing to the demo's user out of the terminal; other warnings come through."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        for message in _CHATTER:
            warnings.filterwarnings("ignore", message=message)
        for name, level in _LOGGERS.items():
            logging.getLogger(name).setLevel(level)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
