"""Linear probes: how well the gold position can be read from the last token's state, layer by layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from repflow.monitor.config import StatesConvention
from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.memory import free_memory, is_out_of_memory
from repflow.monitor.offline.probe_split import released_split, stratified_group_split

Protocol = Literal["paper", "released"]
STATES: dict[str, StatesConvention] = {"paper": "residual", "released": "hf"}
"""Where the last layer of each protocol is: before the final norm, or after it."""
_CHUNK_BYTES = 16 * 2**30  # of features in float32, all at once
_LOGIT_COPIES = 6  # that a step of training holds


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How probes are trained.

    Raises:
        OfflineError: a number out of its range.
    """

    protocol: str = "paper"
    """Where the options come from; see `ProbeOptions.of`."""
    learning_rate: float = 0.05
    weight_decay: float = 0.0
    """Of Adam: added to the gradient, not decoupled."""
    epochs: int = 150
    """Each is one step of Adam on all samples at once."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the initial weights and of the split."""
    validation: float = 0.2
    """Share of the samples that a probe is judged by."""
    grouped: bool = True
    """Split by class and context; False: sorted by class, unshuffled (see `released_split`)."""
    standardised: bool = True
    """Bring every feature to mean 0 and standard deviation 1 over the samples that a probe learns from."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.epochs < 1 or not self.seeds or not 0 < self.validation < 1:
            raise OfflineError(
                "probes: expected a learning rate above 0, one epoch and one seed or more, and a share of validation "
                f"between 0 and 1; got {self}"
            )

    @classmethod
    def of(cls, protocol: Protocol, **changes: Any) -> "ProbeOptions":
        """The options of a protocol, but for `changes`.

        `paper`: as the paper says where it says it. `released`: as the code that it builds on does. What else it has
        of its own is decided where features are extracted: its last layer is the one after the final norm (`STATES`),
        and its samples show each context at every position (`AbstractTask.crossed`).

        Raises:
            OfflineError: an unknown protocol.
        """
        if protocol not in ("paper", "released"):
            raise OfflineError(f"probes: expected the protocol 'paper' or 'released', got {protocol!r}")
        released = {"learning_rate": 0.005, "weight_decay": 1e-3, "grouped": False, "standardised": False}
        return cls(protocol=protocol, **(released if protocol == "released" else {}) | changes)


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Accuracy of the probes on the samples that they were judged by."""

    accuracy: Float64[Tensor, "S seeds"]
    classes: int
    choices: dict[str, Any]
    """Every choice, as plain values."""

    @property
    def chance(self) -> float:
        """1 / C, the accuracy of guessing, whatever classes the samples of validation are of."""
        return 1 / self.classes

    @property
    def mean(self) -> Float64[Tensor, " S"]:
        """Over seeds."""
        return self.accuracy.mean(1)

    @property
    def spread(self) -> Float64[Tensor, " S"]:
        """Standard deviation over seeds (n − 1); NaN for a single one."""
        return self.accuracy.std(1) if self.accuracy.shape[1] > 1 else torch.full_like(self.mean, torch.nan)

    @property
    def peak(self) -> int:
        """The state with the best mean; the first of several."""
        return int(self.mean.argmax())

    @property
    def drop(self) -> float:
        """How much better the peak is than the last state."""
        return float(self.mean[self.peak] - self.mean[-1])


def train_probes(
    features: Callable[[Sequence[int]], Tensor],
    num_states: int,
    labels: Int64[np.ndarray, " N"],
    contexts: Int64[np.ndarray, " N"],
    options: ProbeOptions | None = None,
    *,
    device: torch.device | str | None = None,
    chunk: int | None = None,
) -> ProbeResult:
    """Train a probe for every state and seed: softmax(W x + b), cross-entropy, full batches, Adam.

    All seeds of as many states as fit into memory are one batched problem. Features stay as they are while training:
    what standardises them is folded into the weights, seed by seed, since each seed learns from other samples.

    Args:
        features: from numbers of states to `[states, N, D]`, as `Extraction.features`.
        num_states: S.
        labels: classes from 0.
        contexts: samples of equal number stay on one side of the split.
        options: those of the protocol `paper` if None.
        device: where to train; the GPU if None and there is one.
        chunk: states at once; by their size if None.

    Raises:
        OfflineError: a class is missing on one side of the split, or features are not finite.
        RuntimeError: a single state does not fit into memory.
    """
    options = options or ProbeOptions()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    splits = np.stack([_split(labels, contexts, options, seed) for seed in options.seeds])
    problem = _Problem.of(labels, splits, options, place)
    chunk = chunk or problem.states_at_once(features([0]))
    accuracy: list[Tensor] = []
    while len(accuracy) < num_states:
        wanted = list(range(len(accuracy), min(num_states, len(accuracy) + chunk)))
        found: Tensor | None = None
        try:
            found = problem.train(features(wanted), wanted)
        except RuntimeError as error:
            if not is_out_of_memory(error) or chunk == 1:
                raise
        if found is None:  # out of the exception, whose traceback holds what was allocated
            chunk //= 2
            free_memory()
        else:
            accuracy += found.cpu().unbind()
    return ProbeResult(
        torch.stack(accuracy),
        problem.classes,
        asdict(options)
        | {
            "samples": len(labels),
            "contexts": len(np.unique(contexts)),
            "label": "gold position",
            "device": place.type,
        },
    )


def _split(
    labels: Int64[np.ndarray, " N"], contexts: Int64[np.ndarray, " N"], options: ProbeOptions, seed: int
) -> Bool[np.ndarray, " N"]:
    if options.grouped:
        return stratified_group_split(labels, contexts, validation=options.validation, seed=seed)
    return released_split(labels, validation=options.validation)


@dataclass(frozen=True, eq=False)
class _Problem:
    """What all states have in common: labels, splits, and initial weights."""

    labels: Int64[Tensor, " N"]
    held: Bool[Tensor, "seeds N"]
    """True for the samples of validation."""
    classes: int
    options: ProbeOptions
    device: torch.device

    @classmethod
    def of(
        cls, labels: Int64[np.ndarray, " N"], splits: Bool[np.ndarray, "seeds N"], options: ProbeOptions,
        device: torch.device,
    ) -> "_Problem":  # fmt: skip
        held, classes = torch.from_numpy(splits).to(device), int(labels.max()) + 1
        return cls(torch.from_numpy(labels).to(device), held, classes, options, device)

    def states_at_once(self, features: Float[Tensor, "one N D"]) -> int:
        """How many states like this one fit beside what a step of training holds of them."""
        _, samples, width = features.shape
        logits = len(self.held) * self.classes * samples * _LOGIT_COPIES
        return max(1, _CHUNK_BYTES // (4 * (samples * width + logits)))

    def train(self, features: Float[Tensor, "L N D"], numbers: list[int]) -> Float64[Tensor, "L seeds"]:
        """Accuracy on the samples of validation."""
        x = _float_copy(features, self.device)
        if not bool(x.isfinite().all()):
            bad = [number for number, state in zip(numbers, x, strict=True) if not bool(state.isfinite().all())]
            raise OfflineError(f"probes: expected finite features, found NaN or infinity in states {bad}")
        if self.options.standardised:
            _precondition(x)
        inverse, shift = self._standardisation(x)
        weight, bias = self._initial(len(x), x.shape[-1])
        optimizer = torch.optim.Adam(
            [weight, bias], lr=self.options.learning_rate, weight_decay=self.options.weight_decay
        )
        share = self._share()
        for _ in range(self.options.epochs):
            optimizer.zero_grad()
            # Summed over states and seeds, none of which sees another's gradient.
            (self._losses(self._logits(x, weight, bias, inverse, shift)) * share).sum().backward()
            optimizer.step()
        with torch.no_grad():
            right = self._logits(x, weight, bias, inverse, shift).argmax(-1) == self.labels.unsqueeze(-1)
        held = self.held.T.double()
        return (right * held).sum(1) / held.sum(0)

    def _share(self) -> Float[Tensor, "N seeds"]:
        """1 / number of the samples that a seed learns from, 0 for those of validation."""
        learned = (~self.held).T.float()
        return learned / learned.sum(0)

    def _standardisation(
        self, x: Float[Tensor, "L N D"]
    ) -> tuple[Float[Tensor, "L D seeds"] | None, Float[Tensor, "L D seeds"] | None]:
        """1 / standard deviation, and mean / standard deviation, over the samples that each seed learns from."""
        if not self.options.standardised:
            return None, None
        share = self._share()
        mean = torch.stack([state.T @ share for state in x])
        square = torch.stack([state.square().T @ share for state in x])  # one by one, for want of memory
        variance = square - mean.square()  # safe: x is preconditioned
        inverse = torch.where(variance > 1e-10, variance.clamp(min=1e-10).rsqrt(), 1.0)
        return inverse, mean * inverse

    def _initial(self, states: int, width: int) -> tuple[Tensor, Tensor]:
        """Weights `[L, D, seeds, C]` and biases `[L, seeds, C]` as torch.nn.Linear draws them, equal in all states."""
        bound = 1 / math.sqrt(width)
        drawn = []
        for seed in self.options.seeds:
            generator = torch.Generator().manual_seed(seed)
            drawn.append((torch.rand(width + 1, self.classes, generator=generator) * 2 - 1) * bound)
        both = torch.stack(drawn, 1).to(self.device).expand(states, -1, -1, -1)  # [L, D + 1, seeds, C]
        return both[:, :-1].clone().requires_grad_(), both[:, -1].clone().requires_grad_()

    def _logits(
        self, x: Tensor, weight: Tensor, bias: Tensor, inverse: Tensor | None, shift: Tensor | None
    ) -> Float[Tensor, "L N seeds C"]:
        if inverse is not None and shift is not None:
            bias = bias - (weight * shift.unsqueeze(-1)).sum(1)
            weight = weight * inverse.unsqueeze(-1)
        return (x @ weight.flatten(2)).unflatten(-1, weight.shape[2:]) + bias.unsqueeze(1)

    def _losses(self, logits: Float[Tensor, "L N seeds C"]) -> Float[Tensor, "L N seeds"]:
        """Cross-entropy of every sample."""
        labels = self.labels.view(1, -1, 1).expand(logits.shape[:3])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
        return loss.view(labels.shape)


def _float_copy(features: Float[Tensor, "L N D"], device: torch.device) -> Float[Tensor, "L N D"]:
    """A copy in float32, widened on the device: what is moved there is as narrow as the features are."""
    x = torch.empty(features.shape, dtype=torch.float32, device=device)
    for state, given in zip(x, features, strict=True):  # one by one: no second copy of all on the device
        state.copy_(given.to(device))
    return x


def _precondition(x: Float[Tensor, "L N D"]) -> None:
    """Bring x to mean 0 and standard deviation 1 over all samples, in place.

    This alone changes no result, for it is undone and done again over the samples that a seed learns from. It keeps the
    products exact where a feature lies far from 0, as some do in every trained model.
    """
    for state in x:  # one by one: in float64, all at once would need twice the memory of x
        mean = state.mean(0, dtype=torch.float64)
        deviation = (state.double() - mean).square().mean(0).sqrt()
        scale = torch.where(deviation > 0, deviation, 1.0)
        state.copy_((state.double() - mean) / scale)
