"""Probes on planted data, against scikit-learn, and against one probe trained by itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from repflow.monitor.offline import OfflineError, probing
from repflow.monitor.offline.probe_split import released_split, stratified_group_split
from repflow.monitor.offline.probing import ProbeOptions, ProbeResult, train_probes

CLASSES, WIDTH, SAMPLES = 5, 24, 1500


def planted(strengths: Sequence[float], *, samples: int = SAMPLES, seed: int = 0) -> tuple[Tensor, Any, Any]:
    """States whose class means lie so far apart, in noise of unlike scale and far from 0; labels and contexts."""
    draw = np.random.default_rng(seed)
    labels = np.arange(samples) % CLASSES
    means = draw.normal(size=(CLASSES, WIDTH))
    noise = draw.normal(size=(len(strengths), samples, WIDTH))
    scale, offset = (
        np.logspace(-3, 3, WIDTH),
        draw.normal(size=WIDTH) * np.logspace(2, -2, WIDTH) * np.logspace(-3, 3, WIDTH),
    )
    states = np.stack([strength * means[labels] for strength in strengths]) + noise
    return torch.from_numpy(states * scale + offset).float(), labels, np.arange(samples)


def probe(states: Tensor, labels: Any, contexts: Any, options: ProbeOptions | None = None, **rest: Any) -> ProbeResult:
    return train_probes(
        lambda wanted: states[list(wanted)], len(states), labels, contexts, options, device="cpu", **rest
    )


def test_accuracy_follows_what_is_planted():
    states, labels, contexts = planted([0.0, 0.3, 1.0, 0.5])
    result = probe(states, labels, contexts)
    assert result.accuracy.shape == (4, 5)
    assert abs(float(result.mean[0]) - result.chance) < 0.06
    assert result.mean[0] < result.mean[1] < result.mean[3] < result.mean[2]
    assert (result.peak, result.classes) == (2, CLASSES)
    assert result.drop == pytest.approx(float(result.mean[2] - result.mean[3]))
    assert result.chance == pytest.approx(0.2)
    assert (result.spread > 0).all() and (result.spread < 0.05).all()
    assert (result.choices["samples"], result.choices["contexts"]) == (SAMPLES, SAMPLES)
    assert (result.choices["learning_rate"], result.choices["epochs"], len(result.choices["seeds"])) == (0.05, 150, 5)


def test_agreement_with_scikit_learn():
    """Each seed's accuracy is that of the logistic regression on the samples that it learned from.

    The classes overlap, so that there is one best probe, and not too far away.
    """
    states, labels, contexts = planted([0.1, 0.2, 0.5])
    options = ProbeOptions(epochs=600, seeds=(0, 1))
    result = probe(states, labels, contexts, options)
    for seed in options.seeds:
        held = stratified_group_split(labels, contexts, validation=0.2, seed=seed)
        for state, accuracy in zip(states.double().numpy(), result.accuracy[:, seed], strict=True):
            mean, deviation = state[~held].mean(0), state[~held].std(0)
            x = (state - mean) / deviation
            judge = LogisticRegression(C=np.inf, max_iter=2000, tol=1e-8).fit(x[~held], labels[~held])
            assert abs(judge.score(x[held], labels[held]) - float(accuracy)) <= 1 / held.sum()


def alone(state: Tensor, labels: Any, held: Any, options: ProbeOptions, seed: int) -> float:
    """One probe by itself, of modules of PyTorch, on features that are standardised before."""
    x, y, learned = state.double(), torch.from_numpy(labels), torch.from_numpy(~held)
    if options.standardised:
        x = (x - x[learned].mean(0)) / x[learned].std(0, correction=0)
    layer = torch.nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    bound = WIDTH**-0.5
    drawn = (torch.rand(WIDTH + 1, CLASSES, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * bound
    with torch.no_grad():
        layer.weight.copy_(drawn[:-1].T)
        layer.bias.copy_(drawn[-1])
    adam = torch.optim.Adam(layer.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    for _ in range(options.epochs):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(layer(x[learned]), y[learned]).backward()
        adam.step()
    return float((layer(x[~learned]).argmax(-1) == y[~learned]).double().mean())


@pytest.mark.parametrize("protocol", ["paper", "released"])
def test_all_at_once_equals_each_alone(protocol: Any):
    states, labels, contexts = planted([0.3, 0.8])
    if protocol == "released":
        states = states[:, :, 8:16]  # not standardised: of like scale, and 8 features
        states = torch.cat([states] * 3, -1)
    options = ProbeOptions.of(protocol, seeds=(3, 4), epochs=40)
    result = probe(states, labels, contexts, options)
    for column, seed in enumerate(options.seeds):
        held = (
            stratified_group_split(labels, contexts, validation=0.2, seed=seed)
            if options.grouped
            else released_split(labels, validation=0.2)
        )
        for row, state in enumerate(states):
            assert float(result.accuracy[row, column]) == pytest.approx(
                alone(state, labels, held, options, seed), abs=1.5 / held.sum()
            )


def test_equal_bits_in_every_run_and_chunks_that_change_nothing():
    states, labels, contexts = planted([0.3, 0.8, 0.5], samples=300)
    options = ProbeOptions(epochs=30)
    whole = probe(states, labels, contexts, options, chunk=3)
    for chunk in (3, 1, 2):
        assert torch.equal(whole.accuracy, probe(states, labels, contexts, options, chunk=chunk).accuracy)


def test_features_are_left_as_they_were():
    states, labels, contexts = planted([0.3], samples=300)
    before = states.clone()
    probe(states, labels, contexts)
    assert torch.equal(states, before)


def test_an_affine_change_of_features_changes_nothing():
    """That is what it means to standardise: the noise of other scales and offsets has no say."""
    states, labels, contexts = planted([0.4], samples=600)
    moved = states * torch.logspace(-2, 2, WIDTH) + 1000 * torch.logspace(-2, 2, WIDTH) * states.std((0, 1))
    torch.testing.assert_close(
        probe(states, labels, contexts).accuracy, probe(moved, labels, contexts).accuracy, rtol=0, atol=0.017
    )


def test_a_constant_feature():
    states, labels, contexts = planted([0.8], samples=600)
    states[:, :, 3] = 7.0
    result = probe(states, labels, contexts)
    assert result.mean[0] > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_fewer_bits(dtype: torch.dtype):
    states, labels, contexts = planted([0.5], samples=600)
    states = states[..., 8:16].to(dtype)
    expected = probe(states.float(), labels, contexts).accuracy
    assert torch.equal(probe(states, labels, contexts).accuracy, expected)


def test_out_of_memory_takes_fewer_states(monkeypatch: pytest.MonkeyPatch):
    states, labels, contexts = planted([0.3, 0.8, 0.5, 0.1, 0.2], samples=300)
    options = ProbeOptions(epochs=10)
    expected = probe(states, labels, contexts, options).accuracy
    seen: list[int] = []
    precondition = probing._precondition

    def planted_failure(x: Tensor) -> None:
        seen.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        precondition(x)

    monkeypatch.setattr(probing, "_precondition", planted_failure)
    assert torch.equal(probe(states, labels, contexts, options, chunk=5).accuracy, expected)
    assert seen == [5, 2, 2, 1]
    monkeypatch.setattr(probing, "_CHUNK_BYTES", 1)
    assert torch.equal(probe(states, labels, contexts, options).accuracy, expected)
    assert seen[4:] == [1] * 5


def test_the_released_protocol_never_learns_the_last_classes():
    states, labels, contexts = planted([1.0])
    held = released_split(labels, validation=0.2)
    assert set(labels[held]) == {4} and set(labels[~held]) == {0, 1, 2, 3}
    result = probe(states[..., 8:16], labels, contexts, ProbeOptions.of("released", seeds=(0,)))
    assert float(result.mean[0]) == 0.0
    assert result.chance == 1 / CLASSES  # though all that it is judged by is of one class
    assert result.choices["protocol"] == "released"
    assert (result.choices["learning_rate"], result.choices["weight_decay"]) == (0.005, 1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_split_keeps_contexts_whole_and_classes_in_balance(seed: int):
    draw = np.random.default_rng(seed)
    contexts = draw.integers(0, 260, 2000)
    labels = np.arange(2000) % 11
    held = stratified_group_split(labels, contexts, validation=0.2, seed=seed)
    assert not set(contexts[held]) & set(contexts[~held])
    share = np.bincount(labels[held]) / np.bincount(labels)
    assert abs(share - 0.2).max() < 0.025
    other = stratified_group_split(labels, contexts, validation=0.2, seed=seed + 1)
    assert (held != other).any()
    np.testing.assert_array_equal(held, stratified_group_split(labels, contexts, validation=0.2, seed=seed))


def test_the_split_of_single_samples_is_exact():
    labels = np.arange(20000) % 11
    held = stratified_group_split(labels, np.arange(20000), validation=0.2, seed=0)
    assert set(np.bincount(labels[held])) <= {363, 364}


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_probed():
    states, labels, contexts = planted([0.3, 0.4], samples=300)
    with pytest.raises(OfflineError, match="expected samples of all 5 classes to judge by, found none of class"):
        probe(states, labels, contexts * 0)
    with pytest.raises(OfflineError, match="expected the protocol 'paper' or 'released', got 'mine'"):
        ProbeOptions.of("mine")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OfflineError, match="one epoch and one seed or more"):
        ProbeOptions(seeds=())
    states[1, 17, 3] = torch.inf
    with pytest.raises(OfflineError, match=r"expected finite features, found NaN or infinity in states \[1\]"):
        probe(states, labels, contexts)
