"""Which loss the regularizer follows, and which forwards it is of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from repflow.monitor.injection import loss_of
from tests.monitor import regularizing, toy
from tests.monitor.regularizing import STRENGTH, assert_same, attached, gradients, states_of, term

pytestmark = pytest.mark.usefixtures("untyped")

IDS = [toy.batch(3, 10, seed) for seed in range(3)]


class Around(nn.Module):
    """A model around another one, whose forward is `run(net, *args)`."""

    def __init__(self, run: Callable[..., Any], net: nn.Module | None = None) -> None:
        super().__init__()
        self.net: Any = regularizing.model() if net is None else net
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(self.net, *args)


RETURNED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "alone": lambda logits, loss: loss,
    "first of a tuple": lambda logits, loss: (loss, logits.mean()),
    "behind the logits": lambda logits, loss: (logits, loss),
    "beside a metric": lambda logits, loss: [logits, 2 * loss.detach(), loss],
    "by its name": lambda logits, loss: {"penalty": logits.mean(), "loss": loss},
    "by another name": lambda logits, loss: {"logits": logits, "objective": loss},
}


def written_out(run: Callable[[Any], Tensor], scale: float = 1.0) -> list[Tensor]:
    """Gradients of the loss that `run` makes of a model, and of the term of each forward in it, divided by `scale`."""
    net = regularizing.model()
    with states_of(net.blocks) as states:
        loss = run(net)
    total = sum((term(states[at : at + 2], None) for at in range(0, len(states), 2)), torch.zeros(()))
    ((loss + STRENGTH * total) / scale).backward()
    return gradients(net)


@pytest.mark.parametrize(
    ("way", "compiled"),
    [(way, False) for way in RETURNED]
    + [(way, True) for way in ("behind the logits", "beside a metric", "by its name")],
)
def test_where_a_model_may_return_its_loss(way: str, compiled: bool) -> None:
    torch.compiler.reset()

    def run(net: Any, ids: Tensor) -> Any:
        logits = net(ids)
        return RETURNED[way](logits, nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))

    net = Around(run)
    called: Any = torch.compile(net, backend="aot_eager") if compiled else net
    regularizer = attached(called)
    loss = loss_of(called(IDS[0]))[1]
    assert loss is not None
    (loss / 4).backward()
    regularizer.step()
    assert_same(gradients(net), written_out(lambda net: toy.loss_of(net, IDS[0]), 4))


def test_what_is_no_loss() -> None:
    """A head of one number for a batch of one row, a router's loss without that of the model, counts, and logits."""
    one = torch.ones((), requires_grad=True)
    router = MoeCausalLMOutputWithPast(aux_loss=one, logits=torch.ones(3, 4))  # pyright: ignore[reportArgumentType]
    for output in (one.view(1, 1), one.view(1), router, (one.detach(), torch.ones(3)), torch.tensor(3), None):
        assert loss_of(output)[1] is None
    assert loss_of((torch.ones(3), one, one * 2))[1] is None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_of_one_number_is_not_taken_for_the_loss(compiled: bool) -> None:
    torch.compiler.reset()
    net: Any = Around(lambda net, ids: net(ids)[:, -1].mean(-1, keepdim=True))
    net = torch.compile(net, backend="aot_eager") if compiled else net
    attached(net)
    with pytest.raises(RuntimeError, match=r"call `follow\(loss\)` before backward"):
        (net(IDS[0][:1]) - 3).square().mean().backward()


def test_a_part_of_the_loss_further_in_is_not_taken_for_it() -> None:
    """As a backbone returns that of its router, where the loss is made of what the model around it returns."""
    inner = Around(lambda net, ids: (net(ids), net.norm.weight.square().mean()))
    net = Around(lambda inner, ids: inner(ids), inner)
    outer = Around(lambda net, ids: net(ids)[0], net)
    attached(outer)
    with pytest.raises(RuntimeError, match=r"call `follow\(loss\)` before backward"):
        outer(IDS[0]).square().mean().backward()


@pytest.mark.parametrize("followed", [False, True])
def test_a_log_likelihood(followed: bool) -> None:
    net = Around(lambda net, ids: -toy.loss_of(net, ids))
    regularizer = attached(net)
    out = net(IDS[0])
    if followed:
        regularizer.follow(loss := -out)
        (loss / 4).backward()
        regularizer.step()
        assert_same(gradients(net), written_out(lambda net: toy.loss_of(net, IDS[0]), 4))
        return
    (-out).backward()
    with pytest.raises(RuntimeError, match=r"step 0 a negative gradient came back there in 1 forwards.*call `follow"):
        regularizer.step()


@pytest.mark.parametrize("followed", [False, True])
def test_the_margin_of_two_losses(followed: bool) -> None:
    net = Around(toy.loss_of)
    regularizer = attached(net)

    def margin(net: Any) -> Tensor:
        return nn.functional.softplus(toy.loss_of(net, IDS[0]) - toy.loss_of(net, IDS[1]))

    loss = nn.functional.softplus(net(IDS[0]) - net(IDS[1]))
    if not followed:
        loss.backward()
        with pytest.raises(RuntimeError, match="as a log-likelihood or the margin of two losses has it"):
            regularizer.step()
        return
    regularizer.follow(loss)
    loss.backward()
    regularizer.step()
    assert_same(gradients(net), written_out(margin))


def test_a_negative_scale_that_is_given() -> None:
    net = regularizing.model()
    regularizer = attached(net, loss_scale=-1.0)
    toy.loss_of(net, IDS[0]).backward()
    with pytest.raises(RuntimeError, match="a negative gradient"):
        regularizer.step()


def twice(net: Any, first: Tensor, second: Tensor) -> Tensor:
    """The mean of two losses, as of R-Drop."""
    return (net(first) + net(second)) / 2


def alike(net: Any, first: Tensor, second: Tensor) -> Tensor:
    """How unlike two sentences are, as of SimCSE."""
    return 1 - torch.cosine_similarity(net(first).mean(1), net(second).mean(1)).mean()


@pytest.mark.parametrize("checkpointing", [None, "default"])
@pytest.mark.parametrize("wrapper", ["R-Drop", "SimCSE"])
def test_two_forwards_inside_of_one_loss(wrapper: str, checkpointing: str | None) -> None:
    """Whose scale is that of the outermost module; an own forward of the model after it has its own."""
    inner = regularizing.model(checkpointing=checkpointing)
    net = Around(twice, Around(toy.loss_of, inner)) if wrapper == "R-Drop" else Around(alike, inner)
    regularizer = attached(net)
    loss = net(IDS[0], IDS[1])
    if wrapper == "R-Drop":
        (loss / 4 + net.net(IDS[2]) / 2).backward()
    else:
        (loss / 4).backward()
    regularizer.step()
    own = (lambda net, ids: toy.loss_of(net, ids)) if wrapper == "R-Drop" else None
    if own is None:
        want = written_out(lambda net: alike(net, IDS[0], IDS[1]), 4)
    else:
        both = written_out(lambda net: (own(net, IDS[0]) + own(net, IDS[1])) / 2, 4)
        alone = written_out(lambda net: own(net, IDS[2]), 2)
        want = [one + other for one, other in zip(both, alone, strict=True)]
    assert_same(gradients(net), want)


@pytest.mark.parametrize("way", ["eager", "default", "reentrant", "compiled"])
def test_a_second_backward_through_a_forward(way: str) -> None:
    torch.compiler.reset()
    net: Any = regularizing.model(checkpointing=way if way in ("default", "reentrant") else None)
    called: Any = torch.compile(net, backend="aot_eager") if way == "compiled" else net
    attached(called, loss_scale=1.0)
    logits = called(IDS[0])
    logits.mean().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="as retain_graph=True allows"):
        logits.square().mean().backward()


@pytest.mark.parametrize("way", ["reentrant", "compiled"])
def test_a_forward_whose_backward_is_skipped(way: str) -> None:
    torch.compiler.reset()
    net: Any = regularizing.model(checkpointing="reentrant" if way == "reentrant" else None)
    called: Any = torch.compile(net, backend="aot_eager") if way == "compiled" else net
    regularizer = attached(called, loss_scale=1.0)
    toy.loss_of(called, IDS[0])
    with pytest.raises(RuntimeError, match=r"got 2.*call `discard\(\)`"):
        toy.loss_of(called, IDS[1]).backward()
    regularizer.discard()
    net.zero_grad()
    toy.loss_of(called, IDS[2])
    regularizer.discard()
    toy.loss_of(called, IDS[1]).backward()
    regularizer.step()
    assert_same(gradients(net), written_out(lambda net: toy.loss_of(net, IDS[1])))


def test_a_mask_that_does_not_fit() -> None:
    net = regularizing.model()
    regularizer = attached(net)
    loss = toy.loss_of(net, IDS[0])
    for mask in (torch.ones(3, 9), torch.ones(10, 10), [[1] * 10] * 3):
        with pytest.raises(ValueError, match=r"`follow`: expected a mask of shape \[3, 10\] like the states"):
            regularizer.follow(loss, mask=mask)  # pyright: ignore[reportArgumentType]
    regularizer.detach()
    attached(net, loss_scale=1.0)
    with pytest.raises(ValueError, match=r"got \[3, 9\] from the model's call; pass the right one: follow\(loss, mask"):
        toy.loss_of(net, IDS[0], torch.ones(3, 9)).backward()
