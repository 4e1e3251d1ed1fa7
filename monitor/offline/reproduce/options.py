"""What is asked of `repflow reproduce`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from repflow.monitor.config import StatesConvention
from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.initialisation import Drawn, Scheme, VectorPolicy
from repflow.monitor.offline.paper_models import PAPER_MODELS
from repflow.monitor.offline.probing import Protocol as ProbeProtocol
from repflow.monitor.offline.reproduce.sources import model_source, tokenizer_source
from repflow.monitor.offline.reproduce.targets import Target, chosen_targets
from repflow.monitor.offline.reproduce.work import slug
from repflow.monitor.offline.tasks_command import TASKS
from repflow.monitor.offline.tasks_length import parse_length
from repflow.triton_kernels.hsic import Estimator

PromptProtocol = Literal["task", "random_ids"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAPER_FOUR = ("gpt-neo-2.7b", "pythia-2.8b", "mamba-2.8b", "mamba2-2.7b")
"""The models of its figures."""
_PROBING_SAMPLES, _SAMPLES, _RANDOM_SAMPLES = 20_000, 512, 8


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Every choice.

    Raises:
        OfflineError: an unknown name, a number out of its range, or choices that exclude each other.
    """

    names: tuple[str, ...]
    """Targets, or `all`."""
    models: tuple[str, ...] = ()
    """See `load_model`; those of the paper if there are none."""
    init: bool = False
    """Take configurations alone: no weights are loaded."""
    revision: str | None = None
    """Of the models on the hub: a branch, a tag or a commit."""
    protocol: PromptProtocol | None = None
    """Prompts of a task, or random ids, which need no tokenizer; None: of a task where there is a checkpoint."""
    tokenizer: str | None = None
    """Where it does not lie beside the model."""
    lengths: tuple[str, ...] = ()
    """Of prompts; those of the target if there are none."""
    tasks: tuple[str, ...] = TASKS
    data: Path | None = None
    """Questions for MDQA; those of the paper if None."""
    samples: int | None = None
    """Prompts of each task and length; by the targets if None."""
    prompt_seed: int = 0
    classes: int | None = None
    """Tested gold positions; see `AbstractTask.classes`."""
    seeds: int | None = None
    """How many: of models drawn at random (3 if None), and of probes (5)."""
    states: StatesConvention = "residual"
    cka_estimator: Estimator = "unbiased"
    probes: ProbeProtocol = "paper"
    policies: tuple[VectorPolicy, ...] = get_args(VectorPolicy)
    schemes: tuple[Scheme, ...] = get_args(Scheme)
    embeddings: Drawn = "scheme"
    positions: Drawn = "scheme"
    scaled_positions: bool = False
    """Of figure 7: scale learned positions too."""
    dtype: str | None = None
    """Of the weights; that of the checkpoint if None, and float32 where they are drawn."""
    device: str | None = None
    device_map: str | None = None
    batch_tokens: int = 16384
    folder: Path = Path("repflow-paper")
    force: bool = False
    """Measure again what is there already."""
    pictures: bool = True
    """Draw pictures; False where there is no matplotlib."""

    def __post_init__(self) -> None:
        _ = self.targets
        known = {
            "--protocol": ((self.protocol or "task",), get_args(PromptProtocol)),
            "--task": (self.tasks, TASKS),
            "--states": ((self.states,), get_args(StatesConvention)),
            "--cka": ((self.cka_estimator,), get_args(Estimator)),
            "--probes": ((self.probes,), get_args(ProbeProtocol)),
            "--policy": (self.policies, get_args(VectorPolicy)),
            "--scheme": (self.schemes, get_args(Scheme)),
            "--embeddings": ((self.embeddings,), get_args(Drawn)),
            "--positions": ((self.positions,), get_args(Drawn)),
            "--dtype": ((self.dtype or "float32",), tuple(DTYPES)),
        }
        for option, (given, choices) in known.items():
            if unknown := [name for name in given if name not in choices]:
                raise OfflineError(f"{option}: expected {' or '.join(choices)}, got {unknown[0]!r}")
        self._check_numbers()
        for length in self.lengths:
            parse_length(length)
        self._check_revision()
        self._check_folder()
        self._check_device()

    def _check_numbers(self) -> None:
        least = {
            "--samples": (self.samples, 1),
            "--seeds": (self.seeds, 1),
            "--prompt-seed": (self.prompt_seed, 0),
            "--classes": (self.classes, 2),
            "--batch-tokens": (self.batch_tokens, 1),
        }
        for option, (number, lowest) in least.items():
            if number is not None and number < lowest:
                raise OfflineError(f"{option}: expected {lowest} or more, got {number}")

    def _check_revision(self) -> None:
        if self.revision is None:
            return
        if self.init:
            raise OfflineError("--revision: expected checkpoints, whose weights differ, without --init")
        if local := [name for name in self.model_names if Path(name).exists()]:
            raise OfflineError(f"--revision: expected models on the Hugging Face hub, got the folder {local[0]}")

    def _check_folder(self) -> None:
        there = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise OfflineError(f"--output: expected a folder, and {there} is a file; name another")

    def _check_device(self) -> None:
        if self.device is not None:
            try:
                place = torch.device(self.device)
            except RuntimeError as error:
                raise OfflineError(
                    f"--device: expected one such as cpu, cuda or cuda:1, got {self.device!r}"
                ) from error
            if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
                raise OfflineError(
                    f"--device: expected one of {torch.cuda.device_count()} GPUs that there are, got {self.device!r}"
                )
        if self.device_map is not None and (self.init or self.device is not None):
            raise OfflineError("--device-map: expected a checkpoint to spread, without --init and --device")

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is to be made, but for what `left_out` names."""
        return tuple(target for target in chosen_targets(self.names) if target.name not in self.left_out)

    @property
    def left_out(self) -> dict[str, str]:
        """Targets of `all` that cannot be made, and why.

        Raises:
            OfflineError: one was asked for by its name.
        """
        needy = [target.name for target in chosen_targets(self.names) if target.probes]
        if not needy or not self.random_prompts:
            return {}
        reason = "probes read the gold position of a task, and random ids have none: "
        reason += "name a checkpoint, or with --init also --tokenizer NAME_OR_PATH"
        if "all" not in self.names:
            raise OfflineError(f"{needy[0]}: expected prompts of a task; {reason}")
        return dict.fromkeys(needy, reason)

    @property
    def random_prompts(self) -> bool:
        """Whether prompts are random ids."""
        if self.protocol is None:
            return self.init and self.tokenizer is None
        return self.protocol == "random_ids"

    @property
    def prompt_tasks(self) -> tuple[str, ...]:
        """What prompts are made of."""
        return ("random_ids",) if self.random_prompts else tuple(dict.fromkeys(self.tasks))

    @property
    def model_names(self) -> tuple[str, ...]:
        """What to load."""
        tables = all(target.name.startswith("table") for target in self.targets)
        return tuple(dict.fromkeys(self.models or (tuple(PAPER_MODELS) if tables else PAPER_FOUR)))

    def label(self, name: str) -> str:
        """A model in data and pictures: of a local one the last part of its path, unless two have the same.

        One of a certain revision is told from the one that its name stands for.
        """
        if self.revision is not None:
            return f"{name}@{self.revision}"
        if not Path(name).exists():
            return name
        same = [other for other in self.model_names if slug(other) == slug(name)]
        return slug(name) if len(same) == 1 else name

    @cached_property
    def model_sources(self) -> dict[str, list[Any]]:
        """See `model_source`; looked up once, for the hub has to be asked."""
        return {name: model_source(name, self.revision, init=self.init) for name in self.model_names}

    @cached_property
    def tokenizer_source(self) -> list[Any]:
        """The same of a tokenizer that does not lie beside the model."""
        return [] if self.tokenizer is None or self.random_prompts else tokenizer_source(self.tokenizer)

    @property
    def random_seeds(self) -> tuple[int, ...]:
        """Of models drawn at random."""
        return tuple(range(self.seeds or 3))

    @property
    def probe_seeds(self) -> tuple[int, ...]:
        """Of probes."""
        return tuple(range(self.seeds or 5))

    @property
    def sample_count(self) -> int:
        """Prompts of each task and length."""
        if self.random_prompts:
            return self.samples or _RANDOM_SAMPLES
        return self.samples or (_PROBING_SAMPLES if self.features else _SAMPLES)

    def enough(self, samples: int) -> bool:
        """Whether so many will do: as many as were asked for, or at least as many as there would be."""
        return samples == self.samples if self.samples else samples >= self.sample_count

    @property
    def features(self) -> bool:
        """Whether the states of last tokens are kept, for probes."""
        return not self.random_prompts and any(target.probes for target in self.targets)

    def lengths_of(self, target: Target) -> tuple[int, ...]:
        """Tokens of the prompts of a target."""
        return tuple(dict.fromkeys(map(parse_length, self.lengths or target.lengths)))

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """See `load_model`."""
        return None if self.dtype is None else DTYPES[self.dtype]
