"""Weights drawn anew: what is drawn, what is left alone, and what it does to the stream."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from repflow.monitor.offline import BeyondWindowError, OfflineError
from repflow.monitor.offline.initialisation import (
    Initialisation,
    Role,
    Scheme,
    embedding_scaled,
    initialise,
    neutral_affine,
    norms_as,
    role_of,
)
from repflow.monitor.offline.loading import load_model
from repflow.monitor.offline.random_streams import random_ids, random_stream
from repflow.monitor.offline.recorder import StateRecorder
from tests.monitor.offline import tiny


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with configurations alone."""
    folder = tmp_path_factory.mktemp("configs")
    for kind in tiny.KINDS:
        tiny.config(kind).save_pretrained(folder / kind)
    return {kind: str(folder / kind) for kind in tiny.KINDS}


@pytest.fixture(params=tiny.KINDS)
def model(request: pytest.FixtureRequest, configs: dict[str, str]) -> nn.Module:
    return load_model(configs[request.param], init=True).model


def of_role(model: nn.Module, *roles: Role) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if role_of(model.get_submodule(name.rpartition(".")[0]), name, parameter) in roles:
            yield name, parameter


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_every_parameter_has_its_role(model: nn.Module):
    """By what the names of these four families mean."""
    for name, _ in of_role(model, "matrix"):
        assert name.endswith("weight") and not any(part in name for part in ("norm", "ln_", "embed", "wte", "wpe"))
    for name, _ in of_role(model, "norm"):
        assert "norm" in name or "ln_" in name
    for name, _ in of_role(model, "bias"):
        assert name.endswith(".bias")
    assert [name for name, _ in of_role(model, "embedding")] in (
        ["wte.weight"], ["embed_in.weight"], ["embeddings.weight"],
    )  # fmt: skip
    assert [name for name, _ in of_role(model, "position")] in ([], ["wpe.weight"])
    protected = {name.split("mixer.")[-1] for name, _ in of_role(model, "protected")}
    assert protected in (set(), {"A_log", "D", "dt_proj.bias"}, {"A_log", "D", "dt_bias"})
    assert not list(of_role(model, "other"))
    assert sum(initialise(model, Initialisation()).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scheme", ["gaussian", "xavier", "kaiming"])
def test_the_scheme_of_weights(scheme: Any, model: nn.Module):
    """Standard deviation and bounds by the formulas of their papers; of a convolution [C, 1, K], fan_in = K."""
    initialise(model, Initialisation(scheme=scheme))
    for name, parameter in of_role(model, "matrix", "embedding", "position"):
        weight = parameter.detach()
        outputs, inputs, kernel = weight.shape[0], weight.shape[1], weight[0, 0].numel()
        bound = {
            "gaussian": math.inf,
            "xavier": math.sqrt(6 / ((inputs + outputs) * kernel)),
            "kaiming": math.sqrt(6 / (inputs * kernel)),
        }[scheme]
        std = 0.02 if scheme == "gaussian" else bound / math.sqrt(3)
        assert weight.abs().max() <= bound, name
        assert abs(float(weight.mean())) < 4 * std / math.sqrt(weight.numel()), name
        assert float(weight.std()) == pytest.approx(std, rel=3 / math.sqrt(weight.numel()), abs=0), name


@pytest.mark.parametrize("policy", ["default", "trivial", "scheme"])
def test_the_policy_of_vectors(policy: Any, model: nn.Module):
    before = copied(model)
    with torch.no_grad():
        for name, vector in of_role(model, "norm", "bias"):
            before[name] = vector.add_(0.5).clone()  # so that nothing is trivial by itself
    initialise(model, Initialisation(policy=policy))
    drawn = []
    for role in ("norm", "bias"):
        for name, vector in of_role(model, role):
            match policy:
                case "default":
                    assert torch.equal(vector, before[name])
                case "trivial":
                    one = role == "norm" and name.endswith("weight")
                    assert torch.equal(vector, torch.ones_like(vector) if one else torch.zeros_like(vector))
                case "scheme":
                    drawn.append(vector.detach().flatten())
    if policy == "scheme":
        values = torch.cat(drawn)
        assert float(values.std()) == pytest.approx(0.02, rel=3 / math.sqrt(len(values)))
        assert abs(float(values.mean())) < 4 * 0.02 / math.sqrt(len(values))


def test_what_is_left_alone(model: nn.Module):
    before = copied(model)
    initialise(model, Initialisation(scheme="kaiming", embeddings="default", positions="default"))
    for name, parameter in of_role(model, "protected", "embedding", "position"):
        assert torch.equal(parameter, before[name]), name
    for name, parameter in of_role(model, "matrix"):
        assert not torch.equal(parameter, before[name]), name
    initialise(model, Initialisation(scheme="default", policy="default"))
    kept = copied(model)
    initialise(model, Initialisation(scheme="default", policy="default", seed=1))
    assert all(torch.equal(kept[name], parameter) for name, parameter in model.named_parameters())


def test_the_seed_decides_and_no_other_random_state(model: nn.Module):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    initialise(model, Initialisation(seed=5))
    first = copied(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    initialise(model, Initialisation(seed=5))
    assert all(torch.equal(first[name], parameter) for name, parameter in model.named_parameters())
    initialise(model, Initialisation(seed=6))
    assert not any(torch.equal(first[name], parameter) for name, parameter in of_role(model, "matrix", "norm", "bias"))


def states(model: nn.Module, ids: Tensor) -> Tensor:
    with StateRecorder(model, features=True) as recorder:
        features = recorder.measure(ids).features
    assert features is not None
    return features


class Identity(nn.Module):
    """In the place of a norm; with a gate where the norm has one."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight  # blocks ask for its dtype

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x if gate is None else x * torch.nn.functional.silu(gate)


def test_norms_switched_off_and_on_again(model: nn.Module):
    ids = random_ids(tiny.VOCABULARY, tokens=20)
    initialise(model, Initialisation(scheme="xavier"))
    before = states(model, ids)
    norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    with norms_as(model, "disabled") as changed:
        off = states(model, ids)
    assert changed == len(norms) >= 4
    assert torch.equal(states(model, ids), before)
    for name in norms:
        model.set_submodule(name, Identity(model.get_submodule(name)))
    assert torch.equal(states(model, ids), off)
    assert not torch.equal(off, before)


def test_norms_with_their_affine_parameters_reset(model: nn.Module):
    """The biases of other modules stay as they are."""
    ids = random_ids(tiny.VOCABULARY, tokens=20)
    initialise(model, Initialisation())
    kept, before = copied(model), states(model, ids)
    with norms_as(model, "affine_reset"):
        for name, vector in of_role(model, "norm"):
            assert torch.equal(vector, torch.full_like(vector, float(name.endswith("weight"))))
        assert all(torch.equal(kept[name], bias) for name, bias in of_role(model, "bias"))
        assert not torch.equal(states(model, ids), before)
    assert torch.equal(states(model, ids), before)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_embedding_scaled(kind: str, configs: dict[str, str]):
    model = load_model(configs[kind], init=True).model
    ids = random_ids(tiny.VOCABULARY, tokens=20)
    tokens = model.get_input_embeddings()(ids)[:, -1].detach()  # pyright: ignore
    whole = states(model, ids)[0]
    with embedding_scaled(model, 2.0):
        assert torch.allclose(states(model, ids)[0] - whole, tokens)
    with embedding_scaled(model, 0.5, positions=True):
        assert torch.allclose(states(model, ids)[0], whole / 2)
    assert torch.equal(states(model, ids)[0], whole)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_data_of_the_figures(kind: str, configs: dict[str, str]):
    choice = Initialisation(scheme="xavier", policy="trivial", seed=3)
    found = random_stream(configs[kind], choice, tokens=40, norms="affine_reset", embedding_scale=0.5)
    assert (found.inter_token.shape, found.update_inter_token.shape) == ((4,), (3,))
    assert found.inter_token.abs().max() < 1 and found.nonfinite.sum() == 0
    expected = {
        "protocol": "random_ids", "scheme": "xavier", "policy": "trivial", "embeddings": "scheme", "seed": 3,
        "positions": "scheme", "norms": "affine_reset", "embedding_scale": 0.5, "embedding_scale_of": "tokens",
        "tokens": 40, "sequences": 1, "states": "residual", "weights": "random", "dtypes": ["float32"],
        "protected": "A_log, D, dt_bias, dt_proj.bias",
    }  # fmt: skip
    assert expected.items() <= found.choices.items()
    again = random_stream(configs[kind], choice, tokens=40, norms="affine_reset", embedding_scale=0.5)
    assert torch.equal(again.inter_token, found.inter_token)


def test_a_shared_bias_is_a_shared_direction(configs: dict[str, str]):
    """The transformers collapse where biases and norm affines are drawn too; the state-space models do not."""
    last = {
        (kind, policy): float(
            random_stream(configs[kind], Initialisation(scheme="gaussian", policy=policy), tokens=128).inter_token[-1]
        )
        for kind in tiny.KINDS
        for policy in ("trivial", "scheme")
    }
    for kind in ("gpt_neo", "gpt_neox"):
        assert last[kind, "scheme"] > last[kind, "trivial"] + 0.1
        assert last[kind, "scheme"] > max(last["mamba", "scheme"], last["mamba2", "scheme"]) + 0.1


def test_errors(configs: dict[str, str], tmp_path: Path):
    with pytest.raises(BeyondWindowError, match="skipped 513 tokens: the model's window is 512"):
        random_stream(configs["gpt_neo"], Initialisation(), tokens=513)
    with pytest.raises(OfflineError, match=r"found no config\.json in it"):
        random_stream(str(tmp_path), Initialisation())


@pytest.mark.usefixtures("untyped")
def test_unknown_names():
    with pytest.raises(OfflineError, match=r"scheme among default, gaussian, .*, got 'orthogonal'"):
        Initialisation(scheme="orthogonal")  # pyright: ignore[reportArgumentType]
    with (
        pytest.raises(OfflineError, match="norms: expected one of baseline, disabled, affine_reset, got 'none'"),
        norms_as(nn.Linear(1, 1), "none"),  # pyright: ignore[reportArgumentType]
    ):
        pass


ENDS: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("kind", "sizes", "neutral"),
    [
        ("gemma", {"head_dim": 16}, 0.0),
        ("gemma3_text", {"head_dim": 16}, 0.0),  # with norms of heads, too
        ("nemotron", {}, 0.0),  # LayerNorm1P, which is derived from torch's
        ("llama", {}, 1.0),
    ],
)
def test_norms_at_one_and_zero_have_unit_gain(kind: str, sizes: dict[str, Any], neutral: float):
    """Also those that scale by 1 + weight; whatever their parameters were before."""
    config = transformers.AutoConfig.for_model(kind, hidden_size=32, **ENDS, **HEADS, **sizes)
    model = transformers.AutoModel.from_config(config).eval()
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    token = torch.randn(2, 5, 1)

    def gains() -> list[float]:
        rms = [norm(token * torch.randn(norm.weight.shape)).square().mean(-1).sqrt().mean() for norm in norms]
        return [float(value) for value in rms]

    initialise(model, Initialisation(policy="scheme"))
    drawn = copied(model)
    with torch.no_grad():
        with norms_as(model, "affine_reset") as changed:
            assert gains() == pytest.approx([1.0] * changed, rel=1e-3) and changed == len(norms) >= 5
        assert all(torch.equal(drawn[name], parameter) for name, parameter in model.named_parameters())
        initialise(model, Initialisation(policy="trivial"))
        assert gains() == pytest.approx([1.0] * len(norms), rel=1e-3)
    assert {value for norm in norms for value in norm.weight.tolist()} == {neutral}


class OddNorm(nn.Module):
    """Scales by the square of its weight, or wants more than a state."""

    def __init__(self, wants_more: bool) -> None:
        super().__init__()
        self.weight, self.wants_more = nn.Parameter(torch.full((8,), 3.0)), wants_more

    def forward(self, hidden: Tensor, *more: Tensor) -> Tensor:
        return hidden * (1 + self.weight.square()) * (more[0] if self.wants_more else 1)


@pytest.mark.parametrize(
    ("wants_more", "reason"), [(False, "scales neither by weight nor by 1 [+] weight"), (True, "called by itself")]
)
def test_a_norm_that_is_not_understood_is_not_reset(wants_more: bool, reason: str):
    model = nn.Sequential(OddNorm(wants_more))
    with pytest.raises(OfflineError, match=f"OddNorm: expected a norm whose .* brought to 1 and 0.*{reason}"):
        initialise(model, Initialisation(policy="trivial"))
    with pytest.raises(OfflineError, match="OddNorm"), norms_as(model, "affine_reset"):
        pass
    assert torch.equal(model.get_parameter("0.weight"), torch.full((8,), 3.0))  # as it was
    with norms_as(model, "disabled"):
        assert torch.equal(model(torch.ones(1, 8)), torch.ones(1, 8))


def test_a_norm_that_always_gates():
    module = transformers.models.qwen3_next.modeling_qwen3_next
    gated, plain = module.Qwen3NextRMSNormGated(8), module.Qwen3NextRMSNorm(8)
    assert (neutral_affine(gated), neutral_affine(plain)) == ({"weight": 1.0}, {"weight": 0.0})


def test_the_fans_of_a_layer_that_keeps_inputs_first():
    """GPT-2: the weight of `Conv1D` is [in, out]."""
    sizes: dict[str, Any] = ENDS | {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = transformers.GPT2Model(transformers.GPT2Config(**sizes))
    bounds: dict[Scheme, Any] = {"kaiming": lambda a, b: 6 / a, "xavier": lambda a, b: 6 / (a + b)}
    for scheme, bound in bounds.items():
        initialise(model, Initialisation(scheme=scheme))
        for name, (inputs, outputs) in (("attn.c_attn", (32, 96)), ("mlp.c_fc", (32, 128)), ("mlp.c_proj", (128, 32))):
            weight = model.get_parameter(f"h.0.{name}.weight").detach()
            assert weight.shape == (inputs, outputs)
            std = math.sqrt(bound(inputs, outputs) / 3)
            assert float(weight.std()) == pytest.approx(std, rel=0.06), (scheme, name)
            assert weight.abs().max() <= std * math.sqrt(3)
