"""`similarity_gradient` against autograd through the cosines of all pairs, in float64."""

import pytest
import torch
from torch import Tensor

from repflow.monitor.functional import inter_token_similarity
from repflow.triton_kernels import similarity_gradient
from repflow.triton_kernels.groups import find_groups


def by_pairs(state: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over groups of the mean cosine over pairs, as one writes it down first. `state` in float64."""
    groups = find_groups(torch.ones(state.shape[:2], dtype=torch.bool) if mask is None else mask)
    found: list[Tensor] = []
    for group in range(groups.count):
        tokens = state[groups.index == group]
        tokens = tokens[tokens.isfinite().all(-1) & (tokens != 0).any(-1)]
        if len(tokens) > 1:
            unit = tokens / tokens.norm(dim=-1, keepdim=True)
            found.append((unit @ unit.T)[~torch.eye(len(tokens), dtype=torch.bool)].mean())
    return torch.stack(found).mean() if found else state.new_tensor(torch.nan)


class Similarity(torch.autograd.Function):
    """The similarity as a function of autograd, whose backward is what is tested."""

    @staticmethod
    def forward(ctx, state: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(state)
        ctx.mask = mask
        return similarity_gradient(state, mask).similarity

    @staticmethod
    def backward(ctx, *outgoing: Tensor) -> tuple[Tensor, None]:
        return similarity_gradient(ctx.saved_tensors[0], ctx.mask, weight=outgoing[0]).gradient, None


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes", "empty_row", "documents", "missing_document"])
def test_gradcheck(mask, cases):
    case = cases.Case(torch.float64, (2, 3, 7, 5), getattr(cases, f"mask_{mask}"), padding=0.5)
    state = case.states[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda state: Similarity.apply(state, case.mask), state)


def test_agrees_with_autograd_through_all_pairs(flat_case):
    states, mask = flat_case.states, flat_case.mask
    for state in states:
        wide = state.double().requires_grad_()
        want = by_pairs(wide, mask)
        got = similarity_gradient(state, mask)
        torch.testing.assert_close(got.similarity, want.detach(), rtol=0, atol=1e-12, equal_nan=True)
        assert got.gradient.dtype == state.dtype and got.gradient.shape == state.shape
        if want.isnan():
            assert not got.gradient.any()
            continue
        (gradient,) = torch.autograd.grad(want, wide)
        gradient = torch.where(wide.isfinite().all(-1, keepdim=True), gradient, 0.0).to(state.dtype)
        # Cancels in equal tokens: what is left there is the rounding of s, as a share of ‖s‖/(n²‖h‖).
        length = wide.detach().norm(dim=-1, keepdim=True).nan_to_num(1, 1, 1).clamp(min=1e-300)
        excess = (got.gradient.double() - gradient.double()).abs() - torch.finfo(state.dtype).eps * gradient.abs()
        assert bool((excess <= 1e-13 / length).all()), excess.max()


def test_the_similarity_is_the_one_that_is_published(flat_case):
    want = inter_token_similarity(flat_case.states, flat_case.mask).nanmean(-1)
    got = torch.stack([similarity_gradient(state, flat_case.mask).similarity for state in flat_case.states])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12, equal_nan=True)


def test_hand_worked_gradient():
    """cos(a, b) of a = (2, 0), b = (3, 4) is 3/5; its gradients are (b/5 − 3/5·a/2)/2 and (a/2 − 3/5·b/5)/5."""
    got = similarity_gradient(torch.tensor([[[2.0, 0.0], [3.0, 4.0]]], dtype=torch.float64))
    assert float(got.similarity) == pytest.approx(0.6)
    assert got.gradient.flatten().tolist() == pytest.approx([0, 0.4, 0.128, -0.096])
    assert float(got.added_square) == pytest.approx(0.4**2 + 0.128**2 + 0.096**2) and float(got.onto_square) == 0


def test_the_weight_the_target_and_what_it_is_added_to(cases):
    state = cases.Case(torch.float64, (1, 2, 6, 4)).states[0]
    alone = similarity_gradient(state)
    onto = torch.randn(state.shape, dtype=torch.float64)
    got = similarity_gradient(state, weight=torch.tensor(3.0), target=float(alone.similarity) - 1e-9, onto=onto)
    torch.testing.assert_close(got.gradient, onto + 3 * alone.gradient)
    torch.testing.assert_close(got.onto_square, onto.square().sum())
    torch.testing.assert_close(got.added_square, 9 * alone.gradient.square().sum())


@pytest.mark.parametrize("inactive", [{"weight": 0.0}, {"target": 1.0}, {"mask": torch.zeros(2, 6)}], ids=str)
def test_without_a_term_not_a_bit_changes(inactive, cases):
    """Also not the sign of a zero, nor what is not finite."""
    state = cases.Case(torch.float32, (1, 2, 6, 4)).states[0]
    onto = torch.randn(state.shape)
    onto[0, 0] = torch.tensor([-0.0, 0.0, torch.inf, torch.nan])
    mask = inactive.get("mask")
    options = {name: value for name, value in inactive.items() if name != "mask"}
    got = similarity_gradient(state, None if mask is None else mask.bool(), onto=onto, **options)
    assert torch.equal(got.gradient.view(torch.int32), onto.view(torch.int32)) and float(got.added_square) == 0


def test_a_step_against_it_parts_the_tokens(cases):
    state = cases.Case(torch.float64, (1, 2, 20, 16)).states[0] + 1
    before = similarity_gradient(state)
    after = similarity_gradient(state - 0.1 * before.gradient / before.added_square.sqrt())
    assert float(after.similarity) == pytest.approx(
        float(before.similarity) - 0.1 * float(before.added_square.sqrt()), abs=2e-4
    )


def test_an_empty_batch_has_no_gradient():
    got = similarity_gradient(torch.ones(0, 4, 3), onto=torch.ones(0, 4, 3))
    assert got.gradient.shape == (0, 4, 3) and bool(got.similarity.isnan())


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(4, 3),), {}, ValueError, r"one state of shape \[B, T, D\]"),
        ((torch.ones(1, 4, 3).int(),), {}, TypeError, "float16, bfloat16, float32 or float64"),
        ((torch.ones(1, 4, 3), torch.ones(1, 3)), {}, TypeError, "boolean or integer mask"),
        ((torch.ones(1, 4, 3), torch.ones(1, 3).bool()), {}, ValueError, "mask of shape"),
        ((torch.ones(1, 4, 3),), {"onto": torch.ones(1, 4, 3).half()}, TypeError, "`onto` in torch.float32"),
        ((torch.ones(1, 4, 3),), {"onto": torch.ones(1, 4, 2)}, ValueError, "`onto` of shape"),
    ],
)
def test_errors_say_what_was_expected(arguments, options, error, message):
    with pytest.raises(error, match=message):
        similarity_gradient(*arguments, **options)
