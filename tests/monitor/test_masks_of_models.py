"""Masks that mean something else than they seem to, and padding that nothing tells: on the models that do so."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from repflow.callbacks import RepresentationRegularizer
from repflow.monitor import Monitor, MonitorConfig, Snapshot
from repflow.monitor.masks import CallMasks, token_groups
from repflow.monitor.warning import RepflowWarning
from tests.monitor import toy
from tests.monitor.test_told_masks import IDS, KEEP, SEQ2SEQ, labels

pytestmark = [pytest.mark.usefixtures("untyped")]

WIDTHS: dict[str, Any] = dict(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
TOKENS = int(KEEP.sum())


def measured(model: Any, stream: str | None = None, mask: Any = None, **batch: Tensor) -> Snapshot:
    monitor = Monitor(model.train(), MonitorConfig(every_n_steps=1), stream=stream)
    with monitor.step(0, mask=mask):
        output = model(**batch)
        loss = output if isinstance(output, Tensor) else output[0]
        loss.float().mean().backward()
    monitor.flush()
    assert monitor.latest is not None
    return monitor.latest


def listener() -> Any:
    each = {"layers": 2, "attention_heads": 2, "ffn_dim": 24, "layerdrop": 0.0}
    sizes: dict[str, Any] = {
        f"{side}_{what}": number for side in ("encoder", "decoder") for what, number in each.items()
    }
    return transformers.Speech2TextForConditionalGeneration(
        transformers.Speech2TextConfig(
            vocab_size=32, d_model=16, input_feat_per_channel=8, conv_channels=8, decoder_start_token_id=1, **sizes
        )
    )


def test_a_mask_of_samples_is_no_mask_of_the_states_made_of_them() -> None:
    """An encoder that makes one state of four samples: what the mask's last columns say is not said of the states."""
    batch = {"input_features": torch.randn(4, 48, 8), "attention_mask": KEEP.repeat_interleave(4, 1).long()}
    with pytest.warns(RepflowWarning, match=r"a mask \[4, 48\], which does not fit 12 states, may hold some"):
        assert measured(listener(), "encoder", **batch, labels=IDS).tokens == 48
    with warnings.catch_warnings():
        warnings.simplefilter("error", RepflowWarning)
        assert measured(listener(), "encoder", mask=KEEP, **batch, labels=IDS).tokens == TOKENS


@pytest.mark.parametrize("rows", [1, 2])
def test_a_mask_covers_the_tokens_of_a_cache(rows: int) -> None:
    """As in prefix tuning, whose virtual tokens are a cache in front of those of the batch."""
    front = CallMasks(torch.arange(16).expand(rows, 16) % 15 > 2, cached=True)
    masks = front.of_flat_tokens() if rows == 1 else front
    found = token_groups(masks, rows, 12)
    assert found is not None and found.sum(1).tolist() == [11] * rows


def test_the_regularizer_refuses_a_mask_of_samples() -> None:
    model = listener().train()
    regularizer = RepresentationRegularizer(target=0.0, strength=1.0, layers=[1], stream="encoder").attach(model)
    batch = {"input_features": torch.randn(4, 48, 8), "attention_mask": KEEP.repeat_interleave(4, 1).long()}
    with pytest.raises(ValueError, match=r"a mask \[4, 48\], which does not fit 12 states .*follow\(loss, mask="):
        model(**batch, labels=IDS).loss.backward()
    regularizer.detach()


@pytest.mark.parametrize("some_see_all", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_longformer_takes_what_is_added_to_scores(padded: bool, some_see_all: bool) -> None:
    model = transformers.LongformerModel(
        transformers.LongformerConfig(**WIDTHS, attention_window=[4, 4], max_position_embeddings=40)
    )
    batch: dict[str, Any] = {"attention_mask": KEEP.long()} if padded else {}
    if some_see_all:
        batch["global_attention_mask"] = (torch.arange(12) == 0).long().expand(4, 12)
    assert measured(model, input_ids=IDS, **batch).tokens == (TOKENS if padded else 48)


def test_xlnet_has_its_sequences_in_columns() -> None:
    model = transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=32, d_model=16, n_layer=2, n_head=2, d_inner=24)
    )
    found = measured(model, input_ids=IDS, attention_mask=KEEP.long())
    assert (found.tokens, found.sequences) == (TOKENS, 4)


@pytest.mark.parametrize(
    "name", ["mask_time_indices", "bool_masked_pos", "loss_mask", "decoder_attention_mask", "memory_key_padding_mask"]
)
def test_masks_of_other_things_are_not_asked_for(name: str, recwarn: pytest.WarningsRecorder) -> None:
    class Predicts(toy.Toy):
        def forward(self, ids: Tensor, **masks: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(ids)

    batch: dict[str, Any] = {"ids": IDS, name: KEEP}
    assert measured(Predicts(), None, **batch).tokens == 48
    assert not [warning for warning in recwarn.list if isinstance(warning.message, RepflowWarning)]


def test_a_decoder_that_is_told_of_no_padding() -> None:
    """As the Hugging Face Trainer calls it to smooth labels: it makes the decoder's input and takes the labels away."""
    model = SEQ2SEQ["T5"]()
    given: dict[str, Any] = {"input_ids": IDS, "decoder_input_ids": IDS}
    with pytest.warns(RepflowWarning, match="'decoder_input_ids', given without 'decoder_attention_mask' and 'labels'"):
        assert measured(model, "decoder", **given).tokens == 48
    with warnings.catch_warnings():
        warnings.simplefilter("error", RepflowWarning)
        assert measured(model, "decoder", **given, decoder_attention_mask=KEEP.long()).tokens == TOKENS
        assert measured(model, "encoder", **given).tokens == 48


def test_labels_of_a_module_around_hold_where_the_model_is_called_without() -> None:
    class OwnLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = SEQ2SEQ["T5"]()

        def forward(self, input_ids: Tensor, labels: Tensor, decoder_input_ids: Tensor | None = None) -> Tensor:
            shifted: Any = self.model._shift_right(labels)
            return self.model(input_ids=input_ids, decoder_input_ids=shifted).logits

    assert measured(OwnLoss(), "decoder", input_ids=IDS, labels=labels()).tokens == 22


def test_a_function_that_gives_no_mask_leaves_that_of_the_model() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    batch: dict[str, Any] = {"input_ids": IDS, "attention_mask": KEEP.long(), "labels": IDS}
    assert measured(model, mask=lambda: None, **batch).tokens == TOKENS


def test_the_mask_holds_where_a_block_runs_before_the_first() -> None:
    class Looks(toy.Toy):
        ahead: bool = True

        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            x = self.embed(ids)
            if self.ahead:
                x = self.blocks[1](x)
            for block in self.blocks[0 if self.ahead else 1 :]:
                x = block(x)
            return self.head(x)

    model = Looks()
    assert measured(model, ids=IDS, attention_mask=KEEP).tokens == TOKENS
    model.ahead = False  # and where the first never runs, that is counted once
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.warns(RepflowWarning, match=r"saw 2 forwards that ran 'blocks\.1' where 'blocks\.0' was expected"):
        with monitor.step(0):
            for _ in range(2):
                model(IDS).sum().backward()
        monitor.flush()
