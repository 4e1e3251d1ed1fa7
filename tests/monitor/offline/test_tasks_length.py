"""Prompts of a wanted length, with a tokenizer that is really trained."""

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from repflow.monitor.offline import BeyondWindowError, OfflineError, tasks_length
from repflow.monitor.offline.tasks_kvpr import KeyValueRetrieval
from repflow.monitor.offline.tasks_length import PromptEncoder, encode_samples, fit_items, parse_length, shared_window
from tests.monitor.offline import tiny


def pairs(items: int) -> KeyValueRetrieval:
    return KeyValueRetrieval(items=items, seed=4)


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(tiny.tokenizer(), tiny.VOCABULARY)


@pytest.mark.parametrize(("text", "tokens"), [("300", 300), ("1K", 1024), ("2k", 2048), (" 4K ", 4096)])
def test_lengths(text: str, tokens: int):
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "2M", "1.5K", "two"])
def test_what_is_no_length(text: str):
    with pytest.raises(OfflineError, match="--length: expected a number of tokens, such as 300, 1K, 2K, 4K"):
        parse_length(text)


def mean_length(encoder: PromptEncoder, items: int) -> float:
    return float(np.mean([len(row) for row in encoder([pairs(items).sample(i).prompt for i in range(64)])]))


@pytest.mark.parametrize("tokens", [300, 1024])
def test_the_nearest_number_of_items(encoder: PromptEncoder, tokens: int):
    items = fit_items(pairs, tokens, encoder).items
    misses = [abs(mean_length(encoder, items + more) - tokens) for more in (-1, 0, 1)]
    assert min(misses) == misses[1]


@pytest.mark.parametrize(("tokens", "window"), [(2048, None), (450, 450)])
def test_never_above_the_window(encoder: PromptEncoder, tokens: int, window: int | None):
    """Nor above 2,048 tokens without one: at 2K the nearest number may be one too many."""
    task, limit = fit_items(pairs, tokens, encoder, window), shared_window(tokens, window)
    lengths = [len(row) for row in encode_samples(task, 40, encoder, limit).ids]
    assert max(lengths) <= limit
    assert np.mean(lengths) > limit - 100


@pytest.mark.parametrize(
    ("tokens", "window", "shared"), [(300, None, 2048), (2048, None, 2048), (4096, None, 4096), (300, 512, 512)]
)
def test_models_with_larger_windows_get_the_same_prompts(tokens: int, window: int | None, shared: int):
    assert shared_window(tokens, window) == shared


def test_beyond_the_window(encoder: PromptEncoder):
    with pytest.raises(BeyondWindowError, match="skipped 4,096 tokens: the model's window is 2,048"):
        fit_items(pairs, 4096, encoder, 2048)


def test_samples_that_are_too_long_are_drawn_again(encoder: PromptEncoder):
    task = pairs(4)
    free = encode_samples(task, 300, encoder, 10**9)
    limit = int(np.quantile([len(row) for row in free.ids], 0.7))
    bound = encode_samples(task, 300, encoder, limit)
    again = np.array([len(row) > limit for row in free.ids])
    assert again.any() and not again.all()
    np.testing.assert_array_equal(bound.attempts > 0, again)
    for name in ("labels", "positions", "contexts"):
        np.testing.assert_array_equal(getattr(bound, name), getattr(free, name))
    for index, attempt in enumerate(bound.attempts):
        (row,) = encoder([task.sample(index, int(attempt)).prompt])
        np.testing.assert_array_equal(bound.ids[index], row)
    assert len(bound) == 300
    with pytest.raises(OfflineError, match="at most 100 tokens with 4 pairs, got a longer one for sample 0 in 100"):
        encode_samples(task, 3, encoder, 100)


@pytest.mark.parametrize(
    ("window", "fits", "remedy"),
    [
        (60, "into 60, the window of the model, got", "take another task, or a model with a larger window"),
        (None, "into 64, got", "ask for a larger length"),
        (80, "into 64, got", "ask for a larger length"),
    ],
)
def test_not_even_two_items_fit(
    encoder: PromptEncoder, window: int | None, fits: str, remedy: str, monkeypatch: pytest.MonkeyPatch
):
    """A larger length is a remedy only where there is room for it."""
    monkeypatch.setattr(tasks_length, "_SHARED_WINDOW", 64)
    with pytest.raises(BeyondWindowError, match=f"skipped 60 tokens of kvpr: .* 2 pairs to fit {fits} .*; {remedy}$"):
        fit_items(pairs, 60, encoder, window)


def test_a_prompt_ends_with_its_last_token():
    """What the tokenizer puts in front stays: models are used with it."""
    (bare,) = PromptEncoder(tiny.tokenizer())(["Corresponding value:"])
    ends = PromptEncoder(tiny.with_ends())
    (row,) = ends(["Corresponding value:"])
    assert row.tolist() == [tiny.with_ends().eos_token_id, *bare.tolist()]


def test_a_tokenizer_that_is_not_for_so_many_tokens():
    short = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer, eos_token="<|end|>", model_max_length=1024
    )
    assert fit_items(pairs, 1024, PromptEncoder(short), 1024).items > 2
    with pytest.raises(OfflineError, match=r"expected a tokenizer for 2,048 tokens, got one for 1,024 \(model_max"):
        fit_items(pairs, 2048, PromptEncoder(short))


def test_a_tokenizer_that_cannot_spell():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Key": 1, "value": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    encoder = PromptEncoder(transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))
    with pytest.raises(OfflineError, match="a tokenizer that can spell the prompts, got one that knows no token for 9"):
        fit_items(pairs, 300, encoder)


def test_a_tokenizer_of_another_model():
    with pytest.raises(OfflineError, match="at most the 300 tokens that the model knows, got one with the token 383"):
        PromptEncoder(tiny.tokenizer(), 300)
