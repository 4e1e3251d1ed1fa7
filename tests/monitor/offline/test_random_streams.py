"""A model that is drawn again in place: the same as one that is built for each draw."""

from pathlib import Path

import pytest
import torch

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.initialisation import Initialisation, initialise
from repflow.monitor.offline.loading import load_model
from repflow.monitor.offline.random_streams import RandomModel, random_stream
from tests.monitor.offline import tiny

CHOICES = (
    Initialisation(scheme="gaussian", policy="scheme", seed=4),
    Initialisation(scheme="default", policy="default", seed=4),
    Initialisation(scheme="kaiming", policy="default", embeddings="default", seed=4),
    Initialisation(scheme="xavier", policy="trivial", seed=4),
    Initialisation(scheme="gaussian", policy="default", seed=4),
)


@pytest.mark.parametrize("kind", ["gpt_neo", "mamba"])
def test_the_order_of_draws_does_not_matter(kind: str, tmp_path: Path):
    tiny.config(kind).save_pretrained(tmp_path)
    with RandomModel(str(tmp_path), 4, tokens=40) as model:
        model.stream(CHOICES[0], norms="affine_reset")
        model.stream(CHOICES[0], embedding_scale=2.0)
        found = [model.stream(choice) for choice in (*CHOICES, CHOICES[1])]
    alone = [random_stream(str(tmp_path), choice, tokens=40) for choice in CHOICES]
    for one, other in zip(found, [*alone, alone[1]], strict=True):
        assert torch.equal(one.inter_token, other.inter_token)
        assert torch.equal(one.update_inter_token, other.update_inter_token)
        assert one.choices == other.choices
    values = [stream.inter_token[-1].item() for stream in alone]
    assert len(set(values)) == len(values)
    assert alone[0].choices["blocks"] == ["ssm" if kind == "mamba" else "attention"]


def test_matrices_are_the_same_under_every_policy(tmp_path: Path):
    tiny.config("gpt_neox").save_pretrained(tmp_path)
    models = [load_model(str(tmp_path), init=True).model for _ in range(2)]
    for model, policy in zip(models, ("trivial", "scheme"), strict=True):
        initialise(model, Initialisation(policy=policy, seed=1))
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(one, other) == (one.ndim >= 2), name


def test_a_model_of_another_seed(tmp_path: Path):
    tiny.config("gpt_neo").save_pretrained(tmp_path)
    with (
        RandomModel(str(tmp_path), 0, tokens=8) as model,
        pytest.raises(OfflineError, match="expected a choice of seed 0, got one of seed 1"),
    ):
        model.stream(Initialisation(seed=1))
