"""The regularizer in a loop of one's own: the gradient is that of a loss with the term written into it."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repflow.callbacks import DualAscent, RepresentationRegularizer
from repflow.monitor import Monitor, MonitorConfig
from repflow.triton_kernels._dispatch import force
from tests.monitor import regularizing, toy
from tests.monitor.compiling import STYLES, compile_model
from tests.monitor.regularizing import (
    LAYERS,
    STRENGTH,
    assert_same,
    attached,
    gradients,
    llama,
    states_of,
    term,
)

pytestmark = pytest.mark.usefixtures("untyped")

IDS = [toy.batch(3, 10, seed) for seed in range(4)]
PADDING = torch.ones(3, 10, dtype=torch.long)
PADDING[0, 6:] = 0
PADDING[1, :3] = 0
DOCUMENTS = torch.ones(3, 10, dtype=torch.long)
DOCUMENTS[:, 4:] = 2
DOCUMENTS[2, 8:] = 0
MASKS = {"none": None, "padding": PADDING, "documents": DOCUMENTS}


def written_out(
    net: Any, batches: list[Tensor], mask: Tensor | None = None, scale: float = 1.0, **options: Any
) -> list[Tensor]:
    """Gradients of the loss with the term, over micro-batches."""
    for ids in batches:
        with states_of(net.blocks) as states:
            loss = toy.loss_of(net, ids, mask)
        (scale * (loss + STRENGTH * term(states, mask, **options)) / len(batches)).backward()
    return gradients(net)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_gradient_is_that_of_a_loss_with_the_term(accumulation: int, mask: str) -> None:
    net, plain = regularizing.model(), regularizing.model()
    regularizer, batches = attached(net), IDS[:accumulation]
    for ids in batches:
        loss = toy.loss_of(net, ids, MASKS[mask])
        assert torch.equal(loss, toy.loss_of(plain, ids, MASKS[mask]))
        regularizer.follow(loss)
        (loss / accumulation).backward()
    regularizer.step()
    assert_same(gradients(net), written_out(plain, batches, MASKS[mask]))


@pytest.mark.parametrize("mask", MASKS)
def test_the_contrastive_term(mask: str) -> None:
    net, plain = regularizing.model(), regularizing.model()
    regularizer = attached(net, target=0.3, term="contrastive", loss_scale=1.0)
    toy.loss_of(net, IDS[0], MASKS[mask]).backward()
    regularizer.step()
    assert_same(gradients(net), written_out(plain, IDS[:1], MASKS[mask], target=0.3, contrastive=True))


@pytest.mark.parametrize("checkpointing", ["reentrant", "default"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_checkpointing_runs_again_counts_once(checkpointing: str, accumulation: int) -> None:
    net, plain = regularizing.model(checkpointing=checkpointing), regularizing.model()
    if checkpointing == "reentrant":  # its function needs an input with a gradient, and the embedding gives one
        assert net.embed.weight.requires_grad
    regularizer, batches = attached(net), IDS[:accumulation]
    for ids in batches:
        loss = toy.loss_of(net, ids, PADDING)
        regularizer.follow(loss)
        (loss / accumulation).backward()
    regularizer.step()
    got = gradients(net)
    assert_same(got, written_out(plain, batches, PADDING))
    with states_of(plain.blocks) as states:
        toy.loss_of(plain, batches[-1], PADDING)
    if accumulation == 1:
        shown = [float(regularizer.metrics[f"repflow/regularizer/similarity/state_{layer:02}"]) for layer in LAYERS]
        assert shown == pytest.approx([float(term([state], PADDING, target=-1.0)) - 1 for state in states])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler(dtype: torch.dtype) -> None:
    """States are those of autocast, and what backward begins with is large."""
    net, plain = (regularizing.model(torch.float32) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    regularizer = attached(net)
    with torch.autocast("cpu", dtype):
        loss = toy.loss_of(net, IDS[0], PADDING)
        regularizer.follow(loss)
    scaler.scale(loss / 2).backward()
    with torch.autocast("cpu", dtype), states_of(plain.blocks) as states:
        loss = toy.loss_of(plain, IDS[0], PADDING)
    with_term = loss + STRENGTH * term([state.float() for state in states], PADDING)
    (2.0**10 * with_term / 2).backward()
    regularizer.step()
    for one, other in zip(gradients(net), gradients(plain), strict=True):
        assert float((one - other).norm() / other.norm()) < 2e-2  # as far as products in that precision agree


def test_a_loss_that_the_model_returns_is_followed_by_itself() -> None:
    """Divided, scaled, and added to another one."""
    net, plain = llama(), llama()
    regularizer = attached(net)
    (net(input_ids=IDS[0], attention_mask=PADDING, labels=IDS[0]).loss / 8).backward()
    regularizer.step()
    with states_of(plain.model.layers) as states:
        loss = plain(input_ids=IDS[0], attention_mask=PADDING, labels=IDS[0]).loss
    ((loss + STRENGTH * term(states, PADDING)) / 8).backward()
    assert_same(gradients(net), gradients(plain))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in Triton's interpreter
def test_documents_without_waiting_for_a_gpu() -> None:
    """As the kernels have them, which are not told how many there are: three more than rows; then without room."""
    net, plain = (regularizing.model(torch.float32) for _ in range(2))
    regularizer = attached(net, max_documents=3)
    with force("triton"):
        regularizer.follow(loss := toy.loss_of(net, IDS[0], DOCUMENTS))
        loss.backward()
        regularizer.step()
        assert_same(gradients(net), written_out(plain, IDS[:1], DOCUMENTS), rtol=1e-4, atol=1e-5)
        regularizer.detach()
        regularizer = attached(net, max_documents=1, loss_scale=1.0)
        toy.loss_of(net, IDS[0], DOCUMENTS).backward()
        with pytest.raises(RuntimeError, match=r"at most 1 documents .* and 2 more were left out of step 0"):
            regularizer.step()


def test_a_mask_that_the_model_does_not_receive() -> None:
    net, plain = regularizing.model(), regularizing.model()
    regularizer = attached(net)
    loss = toy.loss_of(net, IDS[0])
    regularizer.follow(loss, mask=DOCUMENTS)
    loss.backward()
    regularizer.step()
    with states_of(plain.blocks) as states:
        loss = toy.loss_of(plain, IDS[0])
    (loss + STRENGTH * term(states, DOCUMENTS)).backward()
    assert_same(gradients(net), gradients(plain))


@pytest.mark.parametrize("checkpointing", [None, "default"])
def test_two_forwards_before_one_backward(checkpointing: str | None) -> None:
    """Each with its own mask, as in DPO; a rollout and an evaluation between them count for nothing."""
    net, plain = regularizing.model(checkpointing=checkpointing), regularizing.model()
    regularizer = attached(net)
    first = toy.loss_of(net, IDS[0], PADDING)
    with torch.no_grad():
        toy.loss_of(net, IDS[2])
    net.eval()
    toy.loss_of(net, IDS[3])
    net.train()
    second = toy.loss_of(net, IDS[1], DOCUMENTS)
    regularizer.follow(loss := (first + second) / 2)
    loss.backward()
    regularizer.step()
    for ids, mask in ((IDS[0], PADDING), (IDS[1], DOCUMENTS)):
        with states_of(plain.blocks) as states:
            loss = toy.loss_of(plain, ids, mask)
        (loss / 2 + STRENGTH * term(states, mask)).backward()
    assert_same(gradients(net), gradients(plain))


class SequenceFirst(nn.Module):
    """PyTorch's own encoder, whose states are `[T, B, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=False)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids).transpose(0, 1))).transpose(0, 1)


def test_states_with_the_sequence_first() -> None:
    torch.manual_seed(0)
    net = SequenceFirst().double()
    plain = copy.deepcopy(net)
    regularizer = attached(net, loss_scale=1.0)
    nn.functional.cross_entropy(net(IDS[0]).flatten(0, 1), IDS[0].flatten()).backward()
    regularizer.step()
    with states_of(plain.encoder.layers) as states:
        loss = nn.functional.cross_entropy(plain(IDS[0]).flatten(0, 1), IDS[0].flatten())
    (loss + STRENGTH * term([state.transpose(0, 1) for state in states], None)).backward()
    assert_same(gradients(net), gradients(plain))


class TwoStreams(nn.Module):
    """A block as mamba_ssm's: hidden and residual apart, whose sum is the state; as tuples with more behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        residual = hidden if residual is None else hidden + residual
        return torch.tanh(self.linear(residual)), residual, None


class TwoStreamModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.layers = nn.ModuleList([TwoStreams() for _ in range(3)])

    def forward(self, ids: Tensor, keep: list[Tensor] | None = None) -> Tensor:
        hidden, residual = self.embed(ids), None
        for index, layer in enumerate(self.layers):
            hidden, residual, _ = layer(hidden, residual)
            if keep is not None and index + 1 in LAYERS:
                keep.append(hidden + residual)
        assert residual is not None
        return self.head(hidden + residual)


def test_a_state_that_is_the_sum_of_two_tensors() -> None:
    torch.manual_seed(0)
    net = TwoStreamModel().double()
    plain, states = copy.deepcopy(net), []
    regularizer = attached(net, loss_scale=1.0)
    nn.functional.cross_entropy(net(IDS[0]).flatten(0, 1), IDS[0].flatten()).backward()
    regularizer.step()
    loss = nn.functional.cross_entropy(plain(IDS[0], states).flatten(0, 1), IDS[0].flatten())
    (loss + STRENGTH * term(states, None)).backward()
    assert_same(gradients(net), gradients(plain))


@pytest.mark.parametrize("checkpointing", [None, "default"])
@pytest.mark.parametrize("style", STYLES)
def test_compiled(style: str, checkpointing: str | None) -> None:
    torch.compiler.reset()
    net, plain = regularizing.model(checkpointing=checkpointing), regularizing.model()
    compiled = compile_model(net, style, backend="aot_eager")
    regularizer = attached(compiled)
    for mask in (PADDING, DOCUMENTS):
        for ids in IDS[:2]:
            loss = toy.loss_of(compiled, ids, mask)
            regularizer.follow(loss)
            (loss / 2).backward()
        regularizer.step()
        assert_same(gradients(net), written_out(plain, IDS[:2], mask))


def test_a_compiled_model_that_returns_its_loss() -> None:
    torch.compiler.reset()
    net, plain = llama(), llama()
    compiled = torch.compile(net, backend="aot_eager")
    regularizer = attached(compiled)
    (compiled(input_ids=IDS[0], attention_mask=PADDING, labels=IDS[0]).loss / 8).backward()
    regularizer.step()
    with states_of(plain.model.layers) as states:
        loss = plain(input_ids=IDS[0], attention_mask=PADDING, labels=IDS[0]).loss
    ((loss + STRENGTH * term(states, PADDING)) / 8).backward()
    assert_same(gradients(net), gradients(plain))


def train(regularizer: RepresentationRegularizer | None, net: Any, steps: range = range(6)) -> list[Tensor]:
    """Losses of some steps of SGD, and the weights at their end."""
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.5), []
    for step in steps:
        loss = toy.loss_of(net, toy.batch(3, 10, step), PADDING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if regularizer is not None:
            regularizer.step()
    return [*losses, *(parameter.detach().clone() for parameter in net.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"strength": 0.0}, {"target": 1.0}], ids=str)
def test_without_a_term_training_is_the_same_to_the_bit(options: dict[str, float], dtype: torch.dtype) -> None:
    net, plain = regularizing.model(dtype), regularizing.model(dtype)
    regularizer = attached(net, loss_scale=1.0, **options)
    assert all(map(torch.equal, train(regularizer, net), train(None, plain)))


def collapse(strength: Any) -> tuple[list[float], list[float]]:
    """Similarity and λ of the last state in 150 steps of a loss that draws all tokens to one point."""
    net, seen = regularizing.model(torch.float32), []
    regularizer = attached(net, layers=[3], target=0.3, strength=strength, loss_scale=1.0)
    net.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output))
    optimizer, values = torch.optim.SGD(net.parameters(), 0.5), []
    for step in range(150):
        net(toy.batch(3, 10, step))
        (seen.pop() - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        regularizer.step()
        values.append([float(value) for value in regularizer.metrics.values()])
    similarity, _, shown, _ = zip(*values, strict=True)
    return list(similarity), list(shown)


def test_the_controller_holds_what_would_collapse() -> None:
    similarity, _ = collapse(0.0)
    assert min(similarity[75:]) > 0.95
    similarity, strength = collapse(DualAscent(step_size=0.05, maximum=5.0, band=0.1))
    assert 0.1 < sum(similarity[75:]) / 75 < 0.5
    assert strength[0] == 0 and 0.5 < max(strength) < 5


def test_dual_ascent_step_by_step() -> None:
    controller = DualAscent(step_size=0.5, maximum=0.3, band=0.1)
    strength = torch.tensor([0.2, 0.2, 0.2, 0.02, 0.2, 0.2], dtype=torch.float64)
    similarity = torch.tensor([0.6, 0.5, 0.42, 0.2, 0.9, torch.nan], dtype=torch.float64)
    got = controller.update(strength, similarity, *controller.limits(0.5, "similarity"))
    assert got.tolist() == pytest.approx([0.25, 0.2, 0.2, 0.0, 0.3, 0.2])


def test_a_schedule_is_asked_for_each_step() -> None:
    net, asked = regularizing.model(), []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1 * step

    regularizer = attached(net, strength=schedule, loss_scale=1.0)
    shown = []
    for step in range(3):
        train(regularizer, net, range(step, step + 1))
        shown.append(float(regularizer.metrics["repflow/regularizer/strength/state_01"]))
    assert shown == pytest.approx([0, 0.1, 0.2]) and asked == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "strength",
    [DualAscent(step_size=0.5, maximum=5.0), lambda step: 0.1 * step, 0.3],
    ids=["controlled", "scheduled", "fixed"],
)
def test_resuming_is_as_if_never_stopped(strength: Any) -> None:
    whole, first = regularizing.model(), regularizing.model()
    want = train(attached(whole, target=0.1, strength=strength, loss_scale=1.0), whole)
    regularizer = attached(first, target=0.1, strength=strength, loss_scale=1.0)
    train(regularizer, first, range(3))
    saved = copy.deepcopy(regularizer.state_dict())
    regularizer.detach()
    again = RepresentationRegularizer(target=0.1, layers=list(LAYERS), strength=strength, loss_scale=1.0)
    again.load_state_dict(saved)
    got = train(again.attach(first), first, range(3, 6))
    assert all(map(torch.equal, got, want[3:]))


def test_values_are_in_the_snapshots_of_a_monitor() -> None:
    net = regularizing.model()
    monitor = Monitor(net, MonitorConfig(every_n_steps=1))
    regularizer = attached(net, loss_scale=1.0, monitor=monitor)
    with monitor.step(0):
        toy.loss_of(net, IDS[0], PADDING).backward()
    regularizer.step()
    monitor.flush()
    assert monitor.latest is not None
    scalars = monitor.latest.scalars
    measured = [float(monitor.latest.inter_token[layer]) for layer in LAYERS]
    assert scalars["regularizer_similarity"] == pytest.approx(sum(measured) / 2, abs=1e-6)
    assert scalars["regularizer_strength"] == STRENGTH and scalars["regularizer_gradient_ratio"] > 0


def test_the_gradient_ratio_is_that_at_the_layer() -> None:
    net, plain = regularizing.model(), regularizing.model()
    regularizer = attached(net, layers=[3], loss_scale=1.0)
    toy.loss_of(net, IDS[0]).backward()
    regularizer.step()
    with states_of(plain.blocks, (3,)) as states:
        loss = toy.loss_of(plain, IDS[0])
    of_loss, of_term = (
        torch.autograd.grad(value, states[0], retain_graph=True)[0].norm()
        for value in (loss, STRENGTH * term(states, None))
    )
    assert float(regularizer.metrics["repflow/regularizer/gradient_ratio/state_03"]) == pytest.approx(
        float(of_term / of_loss)
    )


def test_nothing_is_left_behind() -> None:
    net = regularizing.model()
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()]
    regularizer = attached(net, loss_scale=1.0)
    copied = copy.deepcopy(net)
    toy.loss_of(copied, IDS[0]).backward()  # a copy of the model, as of its averaged weights, has no term
    assert not regularizer._attached().recorded
    regularizer.detach()
    regularizer.detach()
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()]
    kept = weakref.ref(attached(net)._attached())
    gc.collect()
    assert kept() is not None  # it acts as long as it is attached, whoever holds it
    del net
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 1.2}, ValueError, r"a target in \[-1, 1\], as similarities are, got 1.2"),
        ({"target": float("nan")}, ValueError, r"a target in \[-1, 1\]"),
        ({"target": "low"}, TypeError, r"a target in \[-1, 1\], a similarity, got str"),
        ({"layers": [2, 4]}, ValueError, r"layers from 1 to 3, .* got \[4\]"),
        ({"layers": [0]}, ValueError, "state 0 is the input of the first block"),
        ({"layers": [1, -3]}, ValueError, "each layer once"),
        ({"layers": []}, TypeError, "layers as numbers of states"),
        ({"layers": "some"}, TypeError, "layers as numbers of states"),
        ({"strength": -1.0}, ValueError, "finite strength of at least 0, got -1"),
        ({"strength": lambda step: float("nan")}, ValueError, "finite strength of at least 0, got nan"),
        ({"strength": "strong"}, TypeError, "a number, a function of the step, or a DualAscent"),
        ({"term": "other"}, ValueError, 'term="similarity" or "contrastive"'),
    ],
)
def test_wrong_choices(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attached(regularizing.model(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "finite step_size, above 0"),
        ({"maximum": float("inf")}, "finite maximum, above 0"),
        ({"band": -0.1}, "finite band, at least 0"),
        ({"start": 2.0}, "finite start, from 0 to the maximum"),
    ],
)
def test_wrong_controllers(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualAscent(**options)


def test_negative_layers_count_from_the_last() -> None:
    assert attached(regularizing.model(), layers=[-1, 1])._attached().layers == (1, 3)
    assert attached(regularizing.model(), layers="all")._attached().layers == (1, 2, 3)


def test_states_without_a_gradient() -> None:
    """A frozen embedding and first block: the state behind it moves nothing."""
    net = regularizing.model()
    net.embed.requires_grad_(False)
    net.blocks[0].requires_grad_(False)
    attached(net, loss_scale=1.0)
    with pytest.raises(RuntimeError, match=r"the state behind 'blocks\.0' to carry a gradient"):
        toy.loss_of(net, IDS[0])


def test_an_unknown_scale_of_the_loss() -> None:
    net = regularizing.model()
    attached(net)
    with pytest.raises(RuntimeError, match=r"call `follow\(loss\)` before backward"):
        toy.loss_of(net, IDS[0]).backward()


def test_a_step_in_which_nothing_came_back() -> None:
    regularizer = attached(net := regularizing.model(), loss_scale=1.0)
    with pytest.raises(RuntimeError, match="no training forward has run"):
        regularizer.step()
    toy.loss_of(net, IDS[0])
    with pytest.raises(RuntimeError, match="a training forward has run and no gradient has come back"):
        regularizer.step()


def test_gradients_of_gradients_are_refused() -> None:
    net = regularizing.model()
    attached(net, loss_scale=1.0)
    with pytest.raises(NotImplementedError, match="the term has no second derivative"):
        toy.loss_of(net, IDS[0]).backward(create_graph=True)


def test_two_forwards_that_cannot_be_told_apart() -> None:
    net = regularizing.model(checkpointing="reentrant")
    attached(net, loss_scale=1.0)
    loss = toy.loss_of(net, IDS[0]) + toy.loss_of(net, IDS[1])
    with pytest.raises(RuntimeError, match="expected one forward between two backwards, got 2"):
        loss.backward()


def test_a_forward_that_begins_without_gradients() -> None:
    """The lower part is frozen, and run under no_grad."""

    def forward(net: Any, ids: Tensor) -> Tensor:
        with torch.no_grad():
            x = net.blocks[0](net.embed(ids))
        x = net.blocks[2](net.blocks[1](x))
        return nn.functional.cross_entropy(net.head(net.norm(x)).flatten(0, 1), ids.flatten())

    net, plain = regularizing.model(), regularizing.model()
    regularizer = attached(net, layers=[3], loss_scale=1.0)
    forward(net, IDS[0]).backward()
    regularizer.step()
    with states_of(plain.blocks, (3,)) as states:
        loss = forward(plain, IDS[0])
    (loss + STRENGTH * term(states, None)).backward()
    assert_same(gradients(net), gradients(plain))


def test_what_is_not_supported() -> None:
    with pytest.raises(ValueError, match="not in DataParallel"):
        attached(nn.DataParallel(regularizing.model()))
    net = regularizing.model()
    net.blocks[2] = net.blocks[0]
    with pytest.raises(ValueError, match="blocks that run once in a forward"):
        attached(net)
    with pytest.raises(RuntimeError, match=r"call `attach\(model\)` first"):
        RepresentationRegularizer(0.1, [1]).step()
    other = attached(regularizing.model()).state_dict()
    with pytest.raises(ValueError, match=r"the state of layers \[1\], got that of \[1, 3\]"):
        attached(regularizing.model(), layers=[1]).load_state_dict(other)
