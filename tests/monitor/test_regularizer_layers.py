"""Whether each chosen layer acts, on whose tokens, and what is said of it."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repflow.callbacks import DualAscent, RepresentationRegularizer
from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.warning import RepflowWarning
from tests.monitor import regularizing, toy
from tests.monitor.regularizing import STRENGTH, TARGET, assert_same, attached, gradients, llama, states_of, term

pytestmark = pytest.mark.usefixtures("untyped")

IDS = [toy.batch(3, 10, seed) for seed in range(2)]
PADDING = torch.ones(3, 10, dtype=torch.long)
PADDING[0, 4:] = 0


class Skipping(toy.Toy):
    """Leaves out blocks, as stochastic depth does, and may end early."""

    skipped: tuple[int, ...] = ()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for index, block in enumerate(self.blocks):
            if index not in self.skipped:
                x = block(x)
        return self.head(self.norm(x))


def skipping(*skipped: int) -> Skipping:
    net = Skipping()
    net.load_state_dict(regularizing.model().state_dict())
    for block in net.blocks:
        block.dropout.p = 0.0  # pyright: ignore
    net.skipped = skipped
    return net.double()


def eval_block() -> Any:
    net = regularizing.model()
    net.blocks[0].eval()
    return net


def frozen_and_compiled() -> Any:
    net = regularizing.model()
    net.embed.requires_grad_(False)
    net.blocks[0].requires_grad_(False)
    return torch.compile(net, backend="aot_eager")


@pytest.mark.parametrize("make", [eval_block, frozen_and_compiled, lambda: skipping(0)], ids=["eval", "frozen", "left"])
def test_a_layer_that_never_acts(make: Any) -> None:
    torch.compiler.reset()
    net = make()
    regularizer = attached(net, loss_scale=1.0)
    for step in range(20):
        toy.loss_of(net, IDS[0]).backward()
        if step < 19:
            regularizer.step()
    with pytest.raises(RuntimeError, match=r"none has come through 'blocks\.0' in the last 20 steps: is it frozen"):
        regularizer.step()


def test_a_block_that_is_compiled_after_the_regularizer_was_attached() -> None:
    torch.compiler.reset()
    net = regularizing.model()
    regularizer = attached(net, loss_scale=1.0)
    net.blocks[0].compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"through 'blocks\.0' in the last 20 steps.*attach after the model is"):
        for _ in range(20):
            toy.loss_of(net, IDS[0]).backward()
            regularizer.step()


def test_a_layer_may_be_left_out_now_and_then() -> None:
    net = skipping()
    regularizer = attached(net, loss_scale=1.0)
    for step in range(45):
        net.skipped = () if step % 20 == 0 else (0,)
        toy.loss_of(net, IDS[0]).backward()
        regularizer.step()
    assert regularizer.state_dict()["step"] == 45


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_forward_that_leaves_out_the_first_block_has_its_own_mask(way: str) -> None:
    torch.compiler.reset()
    net, plain = skipping(), skipping(0)
    called: Any = torch.compile(net, backend="aot_eager") if way == "compiled" else net
    regularizer = attached(called, layers=[3], loss_scale=1.0)
    toy.loss_of(called, IDS[0], PADDING).backward()
    net.zero_grad()
    net.skipped = (0,)
    mask = PADDING.flip(0)
    toy.loss_of(called, IDS[1], mask).backward()
    got = gradients(net)
    regularizer.step()
    with states_of(plain.blocks, (3,)) as states:
        loss = toy.loss_of(plain, IDS[1], mask)
    (loss + STRENGTH * term(states, mask)).backward()
    assert_same(got, gradients(plain))


def test_the_gradient_ratio_counts_the_terms_of_later_layers_with_the_loss() -> None:
    net, plain = regularizing.model(), regularizing.model()
    regularizer = attached(net, loss_scale=1.0, strength=20.0)
    toy.loss_of(net, IDS[0]).backward()
    regularizer.step()
    with states_of(plain.blocks) as states:
        loss = toy.loss_of(plain, IDS[0])
    first, last = (20 * term([state], None) for state in states)
    for layer, state, own, arriving in ((1, states[0], first, loss + last), (3, states[1], last, loss)):
        added, arrived = (torch.autograd.grad(value, state, retain_graph=True)[0].norm() for value in (own, arriving))
        shown = regularizer.metrics[f"repflow/regularizer/gradient_ratio/state_{layer:02}"]
        assert float(shown) == pytest.approx(float(added / arrived))


def test_a_state_whose_gradient_ends_at_the_input() -> None:
    """All is frozen up to there, and the embedding's output was made to carry a gradient for checkpointing's sake."""
    net = llama().requires_grad_(False)
    net.model.layers[2].requires_grad_(True)
    net.enable_input_require_grads()
    regularizer = attached(net, layers=[1])
    with pytest.raises(RuntimeError, match=r"behind 'model\.layers\.0'.*everything up to there is frozen"):
        net(input_ids=IDS[0], labels=IDS[0])
    regularizer.detach()
    regularizer = attached(net, layers=[3])
    net(input_ids=IDS[0], labels=IDS[0]).loss.backward()
    regularizer.step()


class SoftPrompt(nn.Module):
    """Trains what a frozen model is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = llama().requires_grad_(False)
        self.prompt = nn.Parameter(self.net.model.embed_tokens(IDS[0]).detach() + 0.5)

    def forward(self) -> Tensor:
        return self.net(inputs_embeds=self.prompt, labels=IDS[0]).loss


def test_an_input_that_is_trained() -> None:
    net, plain = SoftPrompt(), SoftPrompt()
    regularizer = attached(net)
    net().backward()
    regularizer.step()
    with states_of(plain.net.model.layers) as states:
        loss = plain()
    (loss + STRENGTH * term(states, None)).backward()
    assert_same(gradients(net), gradients(plain))


@pytest.mark.parametrize("tokens", [12, 16])
def test_one_sequence_without_a_dimension_for_rows(tokens: int) -> None:
    """PyTorch's own encoder takes it with `batch_first=False`, as `[T, D]`; also where T = D."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0)
    net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()
    plain, x = copy.deepcopy(net), torch.randn(tokens, 16, dtype=torch.float64)
    monitor = Monitor(net, MonitorConfig(every_n_steps=1))
    regularizer = attached(net, loss_scale=1.0, monitor=monitor)
    with monitor.step(0):
        net(x).square().mean().backward()
    regularizer.step()
    monitor.flush()
    with states_of(plain.layers, (1, 2, 3)) as states:
        loss = plain(x).square().mean()
    chosen = [state.unsqueeze(0) for state in (states[0], states[2])]
    (loss + STRENGTH * term(chosen, None)).backward()
    assert_same(gradients(net), gradients(plain))
    assert monitor.latest is not None and (monitor.latest.sequences, monitor.latest.tokens) == (1, tokens)
    want = [term([state.unsqueeze(0)], None, target=-1.0).item() - 1 for state in (x, *states)]
    assert monitor.latest.inter_token.tolist() == pytest.approx(want, abs=1e-6)


def test_a_state_that_is_changed_in_place() -> None:
    """PyTorch refuses; its message says whose view it is."""

    class InPlace(toy.Toy):
        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.blocks[0](self.embed(ids))
            x += 1
            return self.head(self.blocks[2](x))

    net = InPlace()
    attached(net, loss_scale=1.0)
    with pytest.raises(RuntimeError, match="RepresentationRegularizerIdentity is a view and is being modified inplace"):
        net(IDS[0])


def test_what_is_left_of_a_cell_that_is_run_again_is_replaced() -> None:
    net = regularizing.model()
    hooks = [len(module._forward_hooks) for module in net.modules()]
    old = attached(net)
    with pytest.warns(
        RepflowWarning, match=r"replaced the regularizer of layers \[1, 3\].* 'blocks'; call its `detach`"
    ):
        new = attached(net, layers=[3], loss_scale=1.0)
    toy.loss_of(net, IDS[0]).backward()
    with pytest.raises(RuntimeError, match="another regularizer of the same model has taken its place"):
        old.step()
    new.step()
    with pytest.warns(RepflowWarning, match=r"replaced the regularizer of layers \[3\]"):
        last = attached(net, layers=[1], loss_scale=1.0)  # of other layers, and what was there has made steps
    for one in (old, new, last):
        one.detach()
    assert hooks == [len(module._forward_hooks) for module in net.modules()]


def test_two_of_one_training_act_on_different_layers() -> None:
    net, plain = regularizing.model(), regularizing.model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        early, late = attached(net, layers=[1], loss_scale=1.0), attached(net, layers=[3], loss_scale=1.0)
    toy.loss_of(net, IDS[0]).backward()
    early.step()
    late.step()
    with states_of(plain.blocks) as states:
        loss = toy.loss_of(plain, IDS[0])
    (loss + STRENGTH * term(states, None)).backward()
    assert_same(gradients(net), gradients(plain))
    toy.loss_of(net, IDS[0]).backward()
    early.step()
    toy.loss_of(net, IDS[0]).backward()
    with pytest.raises(RuntimeError, match=r"that of layers \[3\] acts without; call its `step`"):
        early.step()


def test_attached_again_it_goes_on_with_its_strength() -> None:
    controller = DualAscent(step_size=0.5, maximum=5.0)
    net = regularizing.model()
    regularizer = attached(net, strength=controller, loss_scale=1.0)
    for _ in range(2):
        toy.loss_of(net, IDS[0]).backward()
        regularizer.step()
    state, metrics = regularizer.state_dict(), regularizer.metrics
    regularizer.detach()
    assert regularizer.state_dict() == state and regularizer.metrics == metrics != {}
    regularizer.attach(net)
    assert regularizer.state_dict() == state and min(state["strength"]) > 0
    regularizer.attach(llama())  # with the same layers
    assert regularizer.state_dict() == state
    negative = attached(net, layers=[-1], strength=controller)
    negative.detach()
    negative.attach(toy.Toy(blocks=2))
    assert negative.state_dict() == {"step": 0, "layers": [2], "strength": [0.0]}


def test_a_controller_follows_the_value_of_the_contrastive_term() -> None:
    """Which is above the band while the similarity is below the target."""
    net = regularizing.model()
    controller = DualAscent(step_size=0.5, maximum=5.0, band=0.05)
    regularizer = attached(net, target=0.4, layers=[3], strength=controller, term="contrastive", loss_scale=1.0)
    toy.loss_of(net, IDS[0]).backward()
    regularizer.step()
    with states_of(net.blocks, (3,)) as states:
        toy.loss_of(net, IDS[0])
    value = term(states, None, 0.4, contrastive=True).item()
    shown = {key.split("/")[2]: float(number) for key, number in regularizer.metrics.items()}
    assert shown["value"] == pytest.approx(value) and value > 0.05 and shown["similarity"] < 0.4
    assert regularizer.state_dict()["strength"] == pytest.approx([0.5 * (value - 0.05)])


def test_two_streams_have_names_of_their_own() -> None:
    net = nn.ModuleDict({"encoder": regularizing.model(), "decoder": regularizing.model()})
    monitors = [Monitor(net, MonitorConfig(every_n_steps=1), stream=stream) for stream in net]
    both = [attached(net, stream=stream, loss_scale=1.0, monitor=monitors[0]) for stream in net]
    with monitors[0].step(0):
        for stream in net:
            toy.loss_of(net[stream], IDS[0]).backward()
        for regularizer in both:
            regularizer.step()
    monitors[0].flush()
    assert monitors[0].latest is not None
    names = ("similarity", "value", "strength", "gradient_ratio")
    assert list(monitors[0].latest.scalars) == [f"regularizer_{stream}_{name}" for stream in net for name in names]
    for stream, regularizer in zip(net, both, strict=True):
        assert list(regularizer.metrics) == [
            f"repflow/regularizer/{stream}/{name}/state_{layer:02}" for name in names for layer in (1, 3)
        ]
        value = regularizer.metrics[f"repflow/regularizer/{stream}/value/state_01"]
        similarity = regularizer.metrics[f"repflow/regularizer/{stream}/similarity/state_01"]
        assert float(value) == pytest.approx(float(similarity) - TARGET)


@pytest.mark.parametrize("layers", [np.array([1, 3]), {3, 1}, torch.tensor([1, 3]), (np.int32(1), 3)], ids=repr)
def test_numbers_of_other_kinds(layers: Any) -> None:
    regularizer = RepresentationRegularizer(np.float32(0.5), layers, strength=np.float32(0.1))  # pyright: ignore
    assert regularizer.attach(regularizing.model())._attached().layers == (1, 3)
