"""The streaming metrics: batches and merges add up to one pass, which the definitions confirm."""

import inspect
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from repflow.monitor import AdjacentLayerSimilarity, InterTokenSimilarity, LayerCKA, LayerVariation

MAKERS: dict[str, Callable[..., Metric]] = {
    "inter_token": InterTokenSimilarity,
    "adjacent": AdjacentLayerSimilarity,
    "variation": LayerVariation,
    "cka": LayerCKA,
    "biased_cka": lambda num_states=None: LayerCKA(num_states, estimator="biased"),
}
SIZED = [name for name in MAKERS if name != "variation"]

# Splitting a batch changes the order of float64 sums.
ORDER = 1e-12
# METRICS: V 1e-5 relative, cosines 1e-5 absolute, CKA 2e-3 absolute for the bfloat16 states used here.
ABSOLUTE = {"inter_token": 1e-5, "adjacent": 1e-5, "variation": 0.0, "cka": 2e-3, "biased_cka": 2e-3}


@pytest.fixture(params=list(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def flat(value: Tensor | dict[str, Tensor]) -> Tensor:
    """Every number of a result in one vector."""
    return torch.cat([part.flatten() for part in value.values()]) if isinstance(value, dict) else value.flatten()


def assert_same(got: Tensor | dict[str, Tensor], want: Tensor | dict[str, Tensor]):
    torch.testing.assert_close(flat(got), flat(want), rtol=ORDER, atol=ORDER, equal_nan=True)


def one_pass(name: str, *batches: tuple[Tensor, Tensor | None]) -> Tensor | dict[str, Tensor]:
    metric = MAKERS[name]()
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def expected(oracle, name: str, states: Tensor, mask: Tensor | None) -> np.ndarray:
    """Groups weigh the same for Eq. 2, tokens for what is along depth; HSIC is summed before dividing."""
    h, groups = oracle.upcast(states), oracle.token_groups(states, mask)
    match name:
        case "inter_token":
            return np.nanmean(oracle.inter_token(h, groups), axis=1)
        case "adjacent":
            return np.nanmean(oracle.adjacent_cosine(h, groups).reshape(len(h) - 1, -1), axis=1)
        case "variation":
            return np.array([np.nanmean(oracle.curvature(h, groups)), np.nanmean(oracle.spread(h, groups))])
        case _:
            values, _ = oracle.hsic(h, groups, "biased" if name == "biased_cka" else "unbiased")
            return oracle.cka_from_hsic(np.nansum(values, axis=0)).flatten()


@pytest.fixture(params=["mask_none", "mask_right", "mask_holes", "mask_empty_row", "mask_documents"])
def batch(request, cases) -> tuple[Tensor, Tensor | None]:
    """Rows of unlike lengths, one with a NaN, one with a zero vector."""
    case = cases.Case(torch.bfloat16, (4, 6, 11, 5), getattr(cases, request.param))
    states = case.states
    states[1, 0, 0, 1] = torch.nan
    states[2, 4, 5] = 0
    return states, case.mask


def rows(batch: tuple[Tensor, Tensor | None], part: slice) -> tuple[Tensor, Tensor | None]:
    states, mask = batch
    return states[:, part], None if mask is None else mask[part]


def test_one_pass_agrees_with_the_definition(name, batch, oracle):
    got = flat(one_pass(name, batch))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected(oracle, name, *batch), rtol=1e-5, atol=ABSOLUTE[name])


def test_two_updates_equal_one_pass(name, batch):
    assert_same(one_pass(name, rows(batch, slice(2)), rows(batch, slice(2, None))), one_pass(name, batch))


@pytest.mark.parametrize("incoming", ["metric", "state"])
def test_merging_equals_one_pass(name, batch, incoming: str):
    first, second = MAKERS[name](), MAKERS[name]()
    first.update(*rows(batch, slice(4)))
    second.update(*rows(batch, slice(4, None)))
    first.merge_state(second if incoming == "metric" else dict(second.metric_state))
    assert_same(first.compute(), one_pass(name, batch))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")  # torchmetrics counts no merge
def test_merging_with_an_empty_metric_changes_nothing(name, batch):
    full, empty = MAKERS[name](), MAKERS[name]()
    full.update(*batch)
    empty.merge_state(full)
    assert_same(empty.compute(), one_pass(name, batch))
    full.merge_state(MAKERS[name](num_states=4))
    assert_same(full.compute(), one_pass(name, batch))


def test_merging_another_number_of_states_is_refused(name):
    """Broadcasting would add two states up silently, and V_loc has no size to disagree about."""
    first, second = MAKERS[name](), MAKERS[name]()
    first.update(torch.randn(2, 1, 5, 3))
    second.update(torch.randn(4, 1, 5, 3))
    with pytest.raises(ValueError, match=f"{type(first).__name__}.*expected 2 states.*got 4"):
        first.merge_state(second)


def test_a_merge_fixes_the_number_of_states(name):
    first, second = MAKERS[name](), MAKERS[name]()
    second.update(torch.randn(4, 1, 5, 3))
    first.merge_state(second)
    with pytest.raises(ValueError, match=f"{type(first).__name__}.*expected 4 states.*got 2"):
        first.update(torch.randn(2, 1, 5, 3))


def test_compute_in_between_and_after_reset(name, batch):
    metric = MAKERS[name]()
    metric.update(*rows(batch, slice(3)))
    assert_same(metric.compute(), one_pass(name, rows(batch, slice(3))))
    metric.update(*rows(batch, slice(3, None)))
    assert_same(metric.compute(), one_pass(name, batch))
    metric.reset()
    metric.update(*rows(batch, slice(1, 2)))
    assert_same(metric.compute(), one_pass(name, rows(batch, slice(1, 2))))


def test_forward_gives_the_batch_and_keeps_the_sum(name, batch):
    metric = MAKERS[name]()
    for part in (slice(2), slice(2, 5), slice(5, None)):
        assert_same(metric(*rows(batch, part)), one_pass(name, rows(batch, part)))
    assert_same(metric.compute(), one_pass(name, batch))


def test_inference_mode_and_gradients_leave_no_trace(name, batch):
    states, mask = batch
    metric = MAKERS[name]()
    with torch.inference_mode():
        metric.update(*rows(batch, slice(2)))
    part, part_mask = rows((states, mask), slice(2, None))
    metric.update(part.float().requires_grad_(), part_mask)
    assert_same(metric.compute(), one_pass(name, batch))
    assert not flat(metric.compute()).requires_grad


def test_a_pickled_metric_goes_on(name, batch):
    metric = MAKERS[name]()
    metric.update(*rows(batch, slice(2)))
    copy = pickle.loads(pickle.dumps(metric))
    copy.update(*rows(batch, slice(2, None)))
    assert_same(copy.compute(), one_pass(name, batch))


def test_a_collection_takes_them_all(batch):
    collection = MetricCollection({name: make() for name, make in MAKERS.items()})
    for part in (slice(3), slice(3, None)):
        collection.update(*rows(batch, part))
    got = collection.compute()
    variation = torch.stack([got.pop("v_loc"), got.pop("v_glob")])
    for name, value in (got | {"variation": variation}).items():
        assert_same(value, one_pass(name, batch))


def test_groups_weigh_the_same_and_tokens_weigh_the_same():
    """A row of 2 tokens beside one of 5: they share Eq. 2 by halves and adjacency by sevenths."""
    states = torch.randn(2, 2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    for name, weights in (("inter_token", (1 / 2, 1 / 2)), ("adjacent", (2 / 7, 5 / 7))):
        short, long = (flat(one_pass(name, (states[:, row : row + 1], mask[row : row + 1]))) for row in (0, 1))
        torch.testing.assert_close(flat(one_pass(name, (states, mask))), weights[0] * short + weights[1] * long)


@pytest.mark.parametrize(("estimator", "measured"), [("unbiased", 2), ("biased", 4)])
def test_cka_counts_the_groups_that_are_too_short(estimator, measured: int):
    metric = LayerCKA(estimator=estimator)
    mask = torch.arange(5) < torch.arange(6).unsqueeze(1)
    metric.update(torch.randn(2, 6, 5, 3), mask)
    metric.update(torch.randn(2, 6, 5, 3), mask)
    assert (metric.groups.item(), metric.skipped.item()) == (2 * measured, 2 * (6 - measured))


def test_a_group_without_a_finite_token_is_skipped(name):
    states = torch.randn(3, 2, 6, 4)
    want = one_pass(name, (states[:, 1:], None))
    states[:, 0] = torch.nan
    assert_same(one_pass(name, (states, None)), want)


@pytest.mark.parametrize("name", SIZED)
def test_without_a_token_everything_is_nan(name):
    metric = MAKERS[name](num_states=3)
    metric.update(torch.randn(3, 2, 4, 5), torch.zeros(2, 4, dtype=torch.bool))
    want = {"inter_token": (3,), "adjacent": (2,)}.get(name, (3, 3))
    value = metric.compute()
    assert isinstance(value, Tensor) and value.shape == want and value.isnan().all()


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_compute_without_an_update(name):
    """Of known size, everything is NaN; of unknown size there is nothing to return, and the error says whose."""
    value = MAKERS[name](num_states=3).compute()
    assert isinstance(value, Tensor) and value.numel() in (2, 3, 9) and value.isnan().all()
    metric = MAKERS[name]()
    with pytest.raises(Exception, match=f"`{type(metric).__name__}.*num_states"):
        metric.compute()


@pytest.mark.parametrize("fixed", ["by_the_first_update", "by_num_states"])
def test_another_number_of_states_is_refused_and_changes_nothing(name, fixed: str):
    metric = MAKERS[name](num_states=3 if fixed == "by_num_states" else None)
    states = torch.randn(3, 2, 6, 4)
    metric.update(states)
    message = f"`{type(metric).__name__}.update`: expected 3 states as before, got 5"
    with pytest.raises(ValueError, match=message):
        metric.update(torch.randn(5, 2, 6, 4))
    metric.update(states + 1)
    assert_same(metric.compute(), one_pass(name, (states, None), (states + 1, None)))


def test_a_refused_first_update_fixes_nothing(name):
    metric = MAKERS[name]()
    with pytest.raises(TypeError):
        metric.update(torch.ones(5, 2, 6, 4, dtype=torch.long))
    states = torch.randn(3, 2, 6, 4)
    metric.update(states)
    assert_same(metric.compute(), one_pass(name, (states, None)))


@pytest.mark.parametrize("num_states", [0, -1])
def test_num_states_must_be_a_number_of_states(name, num_states: int):
    message = f"`{type(MAKERS[name]()).__name__}`: expected num_states of 1 or more, got {num_states}"
    with pytest.raises(ValueError, match=message):
        MAKERS[name](num_states=num_states)


def test_an_unknown_estimator_is_refused():
    # The shapes and types in annotations are checked while tests run, before the metric's own check is reached.
    with pytest.raises(ValueError, match='`LayerCKA`: expected estimator="unbiased" or "biased", got \'debiased\''):
        inspect.unwrap(LayerCKA.__init__)(object.__new__(LayerCKA), estimator="debiased")
