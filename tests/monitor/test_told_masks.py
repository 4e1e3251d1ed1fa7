"""Padding however it is told: by the user, by what a decoder is to predict, or not at all, which is said."""

import warnings
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from repflow.callbacks import RepresentationRegularizer
from repflow.monitor import Monitor, MonitorConfig, Snapshot
from repflow.monitor.warning import RepflowWarning
from tests.monitor import toy

pytestmark = [pytest.mark.usefixtures("untyped")]

IDS = toy.batch()
LENGTHS = torch.tensor([3, 12, 7, 1])
KEEP = torch.arange(12) < LENGTHS[:, None]
SIZES: dict[str, Any] = dict(vocab_size=32, d_model=16, decoder_start_token_id=0, pad_token_id=0)
HEADS: dict[str, Any] = {
    f"{side}_{what}": number
    for side in ("encoder", "decoder")
    for what, number in {"layers": 2, "attention_heads": 2, "ffn_dim": 24}.items()
}
SEQ2SEQ = {
    "T5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SIZES, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0)
    ),
    "Bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**SIZES, **HEADS, dropout=0.0, bos_token_id=1, eos_token_id=2)
    ),
}


class Padded(toy.Toy):
    """Takes its mask as `is_pad`, and hands it to no block."""

    def forward(self, ids: Tensor, is_pad: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(ids)


class Heads(nn.Module):
    """Attention whose mask has ones between: `[B, 1, 1, T]`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return x + self.attention(x, x, x, key_padding_mask=~visible[:, 0, 0], need_weights=False)[0]


class MakesItself(nn.Module):
    """Finds padding in its input, and tells its blocks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([Heads() for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x, visible = self.embed(ids), (ids != 0)[:, None, None]
        for block in self.blocks:
            x = block(x, visible)
        return x


def measured(model: Any, *args: Any, config: dict[str, Any] | None = None, mask: Any = None, **kwargs: Any) -> Snapshot:
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, **(config or {})), **kwargs)
    with monitor.step(0, mask=mask):
        output = model(*args) if args else model()
        output.sum().backward()
    monitor.flush()
    assert monitor.latest is not None
    monitor.close()
    return monitor.latest


def said(record: Iterable[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in record if isinstance(warning.message, RepflowWarning)]


@pytest.mark.parametrize(
    ("model", "args", "named"),
    [
        (Padded, (IDS, ~KEEP), r"'is_pad', bool \[4, 12\]"),
        (Padded, (IDS, (~KEEP).float()), r"'is_pad', float32 \[4, 12\]"),
        (MakesItself, (IDS * KEEP,), r"'visible', bool \[4, 1, 1, 12\]"),
    ],
    ids=["booleans", "numbers", "made by the model"],
)
def test_a_mask_under_another_name_is_said_once(model, args, named) -> None:
    model = model()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.warns(
        RepflowWarning, match=rf"measures every token.*\(attention_mask, .*{named}, may hold some"
    ) as record:
        for step in range(2):
            with monitor.step(step):
                model(*args).sum().backward()
        monitor.close()
    assert len(said(record)) == 1
    assert monitor.latest is not None and monitor.latest.tokens == 48


def test_under_a_compiled_model_it_is_said_too() -> None:
    torch.compiler.reset()
    with pytest.warns(RepflowWarning, match=r"'argument 1', bool \[4, 12\], may hold some"):
        assert measured(torch.compile(Padded(), backend="eager"), IDS, ~KEEP).tokens == 48


def test_what_is_no_mask_of_padding_is_not_taken_for_one(recwarn) -> None:
    """Which token sees which; a mask of other tokens; a mask that is read already, or given."""

    class Many(toy.Toy):
        def forward(self, ids, causal_mask=None, patch_mask=None, attention_mask=None, pad=None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(ids)

    square = toy.batch(12, 12)
    measured(Many(), square, torch.ones(12, 12, dtype=torch.bool).tril(), KEEP[:, :9])
    assert measured(Many(), IDS, None, None, KEEP.long(), KEEP).tokens == int(KEEP.sum())
    assert measured(Many(), IDS, None, None, None, ~KEEP, mask=KEEP).tokens == int(KEEP.sum())
    assert said(recwarn.list) == []


def test_a_forward_that_is_left_out_says_nothing_of_the_masks_of_others(recwarn) -> None:
    model = Padded()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        model.eval()(IDS, KEEP)
        model.train()(IDS).sum().backward()
    assert said(recwarn.list) == []


def test_padding_of_a_probe_batch_cannot_be_given() -> None:
    with pytest.warns(
        RepflowWarning, match=r"'is_pad', bool \[4, 12\], may hold some. Take a probe_batch without padding"
    ):
        assert measured(Padded(), IDS, probe_batch=(IDS, ~KEEP)).tokens == 48


def test_a_function_gives_the_mask_of_each_forward_that_is_measured() -> None:
    model, given = Padded(), iter([KEEP, ~KEEP])
    monitor = Monitor(model, MonitorConfig(every_n_steps=2))
    for step in range(2):
        with monitor.step(step, mask=lambda: next(given)):
            for _ in range(2 - step):
                model(IDS).sum().backward()
            model.eval()(IDS)
            model.train()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 48
    assert next(given, None) is None


def test_a_step_inside_of_itself_has_a_mask_of_its_own() -> None:
    model = Padded()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0, mask=KEEP):
        with monitor.step(0, mask=~KEEP):
            model(IDS).sum().backward()
        with pytest.raises(KeyError), monitor.step(0, mask=torch.ones(4, 12)):
            raise KeyError
        model(IDS).sum().backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 48


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 13), r"expected a mask of shape \[4, 12\] like the states, got \[4, 13\]"),
        (torch.ones(12, 12), r"expected a mask of shape \[4, 12\] like the states, got \[12, 12\]"),
        (KEEP.tolist(), r"expected a mask of shape \[4, 12\] like the states, got list"),
        (lambda: {}["pad"], r"the function given as mask= raised KeyError: 'pad'"),
    ],
    ids=["longer", "square", "list", "raises"],
)
def test_a_mask_that_does_not_fit_ends_monitoring_and_no_training(mask, message) -> None:
    """A model's own mask may cover tokens in front of its states; one that was made for these states may not."""
    model = Padded()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.warns(RepflowWarning, match=message), monitor.step(0, mask=mask):
        model(IDS).sum().backward()
    assert not monitor.enabled and model.head.weight.grad is not None


def labels() -> Tensor:
    """With targets left out in front and between, as prompts are, and with a row of padding."""
    made = torch.where(KEEP, IDS.clamp(min=1), -100)
    made[1, :2] = made[1, 5] = -100
    made[3] = -100
    return made


def trained(model: Any, stream: str, **batch: Tensor) -> Snapshot:
    monitor = Monitor(model, MonitorConfig(every_n_steps=1), stream=stream)
    with monitor.step(0):
        model(input_ids=IDS, **batch).loss.backward()
    monitor.flush()
    assert monitor.latest is not None
    return monitor.latest


class Translator(nn.Module):
    """The arguments of an encoder-decoder, and the decoder's input made of its targets."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = toy.Toy()

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None, labels: Tensor | None = None) -> Any:
        assert labels is not None
        return SimpleNamespace(loss=self.decoder(labels.clamp(min=0)).sum())


def test_padding_of_a_compiled_decoder() -> None:
    torch.compiler.reset()
    model: Any = Translator()
    model.compile(backend="eager")
    assert trained(model, "decoder", labels=labels()).tokens == 22


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_padding_of_a_decoder_is_what_lies_behind_its_targets(family: str) -> None:
    """As if the model had been given a mask of it; which, where it has one, is read alone. The encoder has its own."""
    model = SEQ2SEQ[family]().train()
    lengths = torch.tensor([3, 12, 7, 0])
    keep = (torch.arange(12) < lengths[:, None]).long()
    told, given = (
        trained(model, "decoder", labels=labels()),
        trained(model, "decoder", labels=labels(), decoder_attention_mask=keep),
    )
    assert told.tokens == given.tokens == 22 and told.sequences == given.sequences == 3
    torch.testing.assert_close(told.inter_token, given.inter_token)
    torch.testing.assert_close(told.cka, given.cka)
    ones = torch.ones_like(keep)
    assert trained(model, "decoder", labels=labels(), decoder_attention_mask=ones).tokens == 48
    assert trained(model, "encoder", labels=labels()).tokens == 48
    assert trained(model, "encoder", labels=labels(), attention_mask=KEEP.long()).tokens == int(KEEP.sum())


def test_targets_of_a_decoder_alone_are_no_mask() -> None:
    """There they say which tokens are learned from, and prompts are tokens."""
    config = transformers.OPTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16
    )
    model = transformers.OPTForCausalLM(config).train()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        model(input_ids=IDS, labels=labels()).loss.backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 48


def test_the_regularizer_leaves_the_same_padding_out() -> None:
    def gradient(**batch: Tensor) -> Tensor:
        torch.manual_seed(0)
        model = SEQ2SEQ["T5"]().train()
        regularizer = RepresentationRegularizer(target=0.0, strength=1.0, layers=[1], stream="decoder").attach(model)
        model(input_ids=IDS, labels=labels(), **batch).loss.backward()
        regularizer.step()
        regularizer.detach()
        return torch.cat([p.grad.flatten() for p in model.decoder.block[0].parameters() if p.grad is not None])

    lengths = torch.tensor([3, 12, 7, 0])
    keep = (torch.arange(12) < lengths[:, None]).long()
    torch.testing.assert_close(gradient(), gradient(decoder_attention_mask=keep))
    assert not torch.allclose(gradient(), gradient(decoder_attention_mask=torch.ones_like(keep)))


def test_losses_are_those_without_a_monitor() -> None:
    def losses(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = MakesItself()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monitor = Monitor(model, MonitorConfig(every_n_steps=1)) if watched else None
        seen = []
        for step in range(3):
            context = warnings.catch_warnings() if monitor is None else monitor.step(step, mask=lambda: KEEP)
            with context:
                loss = cross_entropy(model(IDS * KEEP).flatten(0, 1), IDS.flatten() % 16)
                loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        return seen

    assert all(map(torch.equal, losses(True), losses(False)))
