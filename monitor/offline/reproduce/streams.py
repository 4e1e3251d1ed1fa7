"""Streams of models drawn at random, for figures 3, 5, 6 and 7: every model, seed, scheme, policy and variant."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from repflow.monitor.offline import BeyondWindowError, OfflineError
from repflow.monitor.offline.initialisation import Initialisation, NormVariant, Scheme, VectorPolicy
from repflow.monitor.offline.loading import load_config
from repflow.monitor.offline.processes import Processes
from repflow.monitor.offline.progress import WorkProgress
from repflow.monitor.offline.random_streams import RandomModel
from repflow.monitor.offline.reproduce.options import ReproduceOptions
from repflow.monitor.offline.reproduce.targets import Target
from repflow.monitor.offline.reproduce.work import (
    LineStore,
    content_key,
    device_name,
    place,
    plain,
    versions,
)

SCALES = (0.5, 1.0, 2.0)
NORMS: tuple[NormVariant, ...] = ("baseline", "disabled", "affine_reset")


@dataclass(frozen=True, kw_only=True)
class Point:
    """How a model is drawn and changed, but for its seed."""

    scheme: Scheme
    policy: VectorPolicy
    norms: NormVariant = "baseline"
    embedding_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One measured stream."""

    model: str
    seed: int
    point: Point
    inter_token: list[float | None]
    update_inter_token: list[float | None]
    norms: list[float | None]
    nonfinite: list[int]
    choices: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """All that was measured, and what could not be."""

    found: tuple[Stream, ...]
    skipped: tuple[str, ...]
    """What is to be said of models whose window is too small."""

    def of(self, points: Iterable[Point]) -> list[Stream]:
        """Those of some points."""
        wanted = set(points)
        return [stream for stream in self.found if stream.point in wanted]


def points_of(target: Target, options: ReproduceOptions) -> list[Point]:
    """What a target needs."""
    points = [Point(scheme=scheme, policy=policy) for scheme, policy in product(options.schemes, options.policies)]
    changes: dict[str, list[dict[str, Any]]] = {
        "figure6": [{"norms": norms} for norms in NORMS],
        "figure7": [{"embedding_scale": scale} for scale in SCALES],
    }
    return [
        Point(scheme=point.scheme, policy=point.policy, **change)
        for point in points
        for change in changes.get(target.name, [{}])
    ]


def measure_streams(
    options: ReproduceOptions, targets: Iterable[Target], processes: Processes, console: Console
) -> Streams:
    """Measure what targets need, but for what is there. Processes share the models and seeds.

    Raises:
        OfflineError: there is no such configuration, it cannot be followed, or memory does not suffice.
    """
    for name in options.model_names:
        load_config(name)  # so that one that does not exist is told before hours with the others
    wanted = {point: None for target in targets for point in points_of(target, options)}
    # What transformers draws comes first: afterwards it would have to be drawn again.
    points = sorted(wanted, key=lambda point: point.scheme != "default")
    units = list(product(options.model_names, options.random_seeds))
    skipped: set[str] = set()
    for number, (name, seed) in enumerate(units):
        if name in skipped or number % processes.world != processes.rank:
            continue
        try:
            _measure(options, name, seed, points, console)
        except BeyondWindowError as error:
            skipped.add(name)
            console.print(Text(str(error), style="yellow"), soft_wrap=True)
    processes.wait()
    found = [stream for name, seed in units for stream in _read(options, name, seed) if stream.point in wanted]
    have, tokens = {stream.model for stream in found}, random_tokens(options)
    return Streams(
        found=tuple(found),
        skipped=tuple(
            f"{label}: skipped {tokens:,} tokens: the model's window is smaller"
            for label in map(options.label, options.model_names)
            if label not in have
        ),
    )


def random_tokens(options: ReproduceOptions) -> int:
    """Length of the random ids.

    Raises:
        OfflineError: several lengths were asked for.
    """
    lengths = {tokens for target in options.targets if target.random for tokens in options.lengths_of(target)}
    if len(lengths) > 1:
        raise OfflineError(
            f"--length: expected one length for figures 3, 5, 6 and 7, got {', '.join(options.lengths)}; name one, or "
            "other targets"
        )
    return lengths.pop()


def _store(options: ReproduceOptions, name: str, seed: int) -> LineStore:
    key = {
        "model": name,
        "content": content_key(name),
        "seed": seed,
        "tokens": random_tokens(options),
        "embeddings": options.embeddings,
        "positions": options.positions,
        "scaled_positions": options.scaled_positions,
        "dtype": options.dtype or "float32",
    }
    stem = place(options.folder, "streams", f"{name}-seed{seed}", key)
    return LineStore(stem.with_name(f"{stem.name}.jsonl"))


def _read(options: ReproduceOptions, name: str, seed: int) -> Iterator[Stream]:
    for record in _store(options, name, seed).read():
        yield Stream(**{**record, "model": options.label(name), "point": Point(**record["point"])})


def _measure(options: ReproduceOptions, name: str, seed: int, points: list[Point], console: Console) -> None:
    store = _store(options, name, seed)
    if options.force:
        store.clear()
    done = {stream.point for stream in _read(options, name, seed)}
    missing = [point for point in points if point not in done]
    if not missing:
        return
    model = RandomModel(
        name,
        seed,
        tokens=random_tokens(options),
        dtype=options.weights_dtype or torch.float32,
        device=options.device,
    )
    label = f"{name}, seed {seed}"
    console.print(Text(f"{label}: {len(missing)} streams"), soft_wrap=True)
    with (
        WorkProgress(console, label, len(points), len(points) - len(missing), unit="streams") as bar,
        _fast_products(),
        model,
    ):
        for point in missing:
            _add(store, model, options, name, seed, point)
            bar.advance(1)


def _add(store: LineStore, model: RandomModel, options: ReproduceOptions, name: str, seed: int, point: Point) -> None:
    choice = Initialisation(
        scheme=point.scheme,
        policy=point.policy,
        embeddings=options.embeddings,
        positions=options.positions,
        seed=seed,
    )
    found = model.stream(
        choice,
        norms=point.norms,
        embedding_scale=point.embedding_scale,
        scaled_positions=options.scaled_positions,
    )
    told = {"device_name": device_name(found.choices["device"]), "versions": versions()}
    store.add(
        {
            "seed": seed,
            "point": asdict(point),
            "inter_token": plain(found.inter_token),
            "update_inter_token": plain(found.update_inter_token),
            "norms": plain(found.norms),
            "nonfinite": plain(found.nonfinite),
            "choices": found.choices | told,
        }
    )


@contextmanager
def _fast_products() -> Iterator[None]:
    """Products of float32 matrices with TF32 on a GPU: four times as fast, with inputs rounded to 11 bits.

    The stream itself stays float32, whereas bfloat16 would round each state to 8 bits, block after block.
    """
    before = torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
