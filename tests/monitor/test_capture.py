"""What is captured is what ran, and only what trained."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.functional import adjacent_layer_similarity, inter_token_similarity
from tests.monitor import toy


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def captured(monitor: Monitor) -> list[torch.Tensor]:
    """Copies of the states of each forward that the monitor captures from now on."""
    seen: list[torch.Tensor] = []
    add = monitor._capture.on_forward

    def keep(forward) -> None:
        seen.append(forward.states.clone())
        add(forward)

    monitor._capture.on_forward = keep
    return seen


@pytest.mark.parametrize("checkpointing", [None, "default", "reentrant"])
def test_states_equal_those_of_hooks_of_ones_own(checkpointing) -> None:
    """Bit for bit, once for each forward, also when checkpointing runs every block again during backward."""
    model = toy.Toy(checkpointing=checkpointing)
    own = toy.record_states(model)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    seen = captured(monitor)
    for step in range(2):
        with monitor.step(step):
            toy.loss_of(model, toy.batch(seed=step)).backward()
    monitor.close()
    assert len(seen) == 2 and len(own) == 2 * 4
    for step in range(2):
        assert torch.equal(seen[step], torch.stack(own[4 * step : 4 * step + 4]))
    assert monitor.latest is not None and monitor.latest.tokens == 4 * 12


def test_only_training_forwards_with_gradients() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    seen = captured(monitor)
    with monitor.step(0):
        with torch.no_grad():
            toy.loss_of(model, toy.batch())
        model.eval()
        toy.loss_of(model, toy.batch())
        model.train()
        with torch.inference_mode():
            toy.loss_of(model, toy.batch())
        toy.loss_of(model, toy.batch()).backward()
    assert len(seen) == 1


def test_generate_inside_a_step_is_not_recorded() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).train()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    ids = torch.arange(3, 13).view(1, 10)
    with monitor.step(0):
        model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            ids, max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        model(input_ids=ids, labels=ids).loss.backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 10


def test_a_frozen_backbone_is_not_recorded_and_that_is_said() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0), torch.no_grad():
        toy.loss_of(model, toy.batch())
    with pytest.warns(
        RuntimeWarning, match=r"recorded nothing on step 0.*'blocks\.0', saw 1 forwards without gradients"
    ):
        monitor.flush()
    assert monitor.latest is None and monitor.enabled


def test_no_hooks_between_sampled_steps() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=2))
    assert hooks(model) == 0
    for step in range(4):
        with monitor.step(step):
            toy.loss_of(model, toy.batch()).backward()
            assert (hooks(model) > 0) == (step % 2 == 0)
        assert hooks(model) == 0
    monitor.close()
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_exception_and_nothing_is_published() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.raises(ZeroDivisionError), monitor.step(0):
        toy.loss_of(model, toy.batch()).backward()
        raise ZeroDivisionError
    assert hooks(model) == 0
    monitor.flush()
    assert monitor.latest is None
    with monitor.step(0):
        toy.loss_of(model, toy.batch()).backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 48


def test_mask_of_the_model() -> None:
    model = toy.Toy()
    own = toy.record_states(model)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, 7:] = 0
    mask[2] = 0
    for step, call in enumerate([lambda: model(toy.batch(), mask), lambda: model(toy.batch(), attention_mask=mask)]):
        own.clear()
        with monitor.step(step):
            call().sum().backward()
        monitor.flush()
        states, snapshot = torch.stack(own), monitor.latest
        assert snapshot is not None and (snapshot.tokens, snapshot.sequences) == (int(mask.sum()), 3)
        torch.testing.assert_close(snapshot.inter_token, inter_token_similarity(states, mask).nanmean(1))
        cosine = adjacent_layer_similarity(states, mask).double().flatten(1)
        torch.testing.assert_close(snapshot.adjacent, cosine.nanmean(1))


def test_mask_from_the_nearest_ancestor_when_the_root_is_never_called() -> None:
    """As under Lightning: the root's forward does not run, and the model inside is called with the mask."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = Outer()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = toy.Toy()

        def forward(self, ids, attention_mask):
            widened = attention_mask[:, None, None, :].float()
            assert widened.ndim == 4
            return self.model(ids, attention_mask)

    root = Root()
    monitor = Monitor(root, MonitorConfig(every_n_steps=1))
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, 6:] = False
    with monitor.step(0):
        root.outer(toy.batch(), mask).sum().backward()
        root.outer.model(toy.batch()).sum().backward()  # without a mask: the one before must not stick
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 24 + 48


def test_mask_given_with_the_step_wins() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    packed = torch.tensor([[1] * 5 + [2] * 7]).repeat(4, 1)
    with monitor.step(0, mask=packed):
        model(toy.batch(), torch.ones(4, 12)).sum().backward()
    monitor.flush()
    assert monitor.latest is not None and (monitor.latest.tokens, monitor.latest.sequences) == (48, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_masks_of_other_dtypes(dtype) -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    mask = torch.ones(4, 12, dtype=dtype)
    mask[:, 8:] = 0
    with monitor.step(0):
        model(toy.batch(), mask).sum().backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 32


def test_buffer_takes_the_promoted_dtype() -> None:
    """Mamba in bf16 has h^(0) in bf16 and the rest in float32: nothing may be narrowed."""

    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([toy.Block(16) for _ in range(2)])

        def forward(self, x):
            x = x.bfloat16()
            for block in self.blocks:
                x = block(x.float())
            return x

    class Cast(toy.Block):
        def forward(self, x):
            return super().forward(x.float())

    model = Widening()
    model.blocks = nn.ModuleList([Cast(16), Cast(16)])
    model.forward = lambda x: model.blocks[1](model.blocks[0](x.bfloat16()))
    own = toy.record_states(model)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    seen = captured(monitor)
    x = torch.randn(2, 6, 16)
    for step in range(2):
        with monitor.step(step):
            model.forward(x).sum().backward()
    assert [s.dtype for s in seen] == [torch.float32] * 2
    for step in range(2):
        assert all(torch.equal(a, b.float()) for a, b in zip(seen[step], own[3 * step : 3 * step + 3], strict=True))


def test_budget_of_tokens() -> None:
    model = toy.Toy()
    own = toy.record_states(model)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, max_tokens=30))
    seen = captured(monitor)
    with monitor.step(0):
        toy.loss_of(model, toy.batch(rows=4, tokens=12)).backward()
        toy.loss_of(model, toy.batch(rows=2, tokens=100)).backward()
    assert [s.shape for s in seen] == [(4, 2, 12, 16), (4, 1, 30, 16)]
    whole = torch.stack(own[4:])  # [S, 2, 100, D]: dropout makes the last state of every token its own
    same = (whole[-1].flatten(0, 1).unsqueeze(1) == seen[1][-1, 0]).all(-1)  # [200, 30]
    assert same.sum(0).tolist() == [1] * 30
    position = same.long().argmax(0)
    assert len(set((position // 100).tolist())) == 1 and position.tolist() == sorted(position.tolist())
    assert torch.equal(whole.flatten(1, 2)[:, position], seen[1][:, 0])


def test_budget_of_memory_is_said() -> None:
    model = toy.Toy(width=512)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, max_memory_mib=1))
    with pytest.warns(RuntimeWarning, match="measures 128 tokens of a micro-batch instead of 400: max_memory_mib=1"):
        with monitor.step(0):
            toy.loss_of(model, toy.batch(rows=4, tokens=100)).backward()
        monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 100  # whole sequences


def test_budget_of_memory_where_only_the_first_state_is_narrow() -> None:
    """A residual in float32 on an embedding in bfloat16: 341 tokens would fit if all states were like the first."""
    sizes: dict = dict(vocab_size=32, hidden_size=512, num_hidden_layers=2, state_size=4, time_step_rank=4)
    config = transformers.MambaConfig(**sizes, residual_in_fp32=True)
    model = transformers.MambaForCausalLM(config).bfloat16().train()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, max_memory_mib=1))
    seen = captured(monitor)
    ids, said = toy.batch(rows=4, tokens=60), "measures 170 tokens of a micro-batch instead of 240: max_memory_mib=1"
    with pytest.warns(RuntimeWarning, match=said), monitor.step(0):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert [(states.dtype, states.shape) for states in seen] == [(torch.float32, (3, 2, 60, 512))]


def test_buffer_keeps_its_address() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    addresses = set()
    for step in range(3):
        with monitor.step(step):
            toy.loss_of(model, toy.batch(rows=4 - step)).backward()
        flat = monitor._capture.buffer._flat
        assert flat is not None
        addresses.add(flat.data_ptr())
    assert len(addresses) == 1


def test_a_module_that_runs_at_several_depths() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(8, 8)

        def forward(self, x):
            for _ in range(3):
                x = self.block(x)
            return x

    model = Shared()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1), blocks=[model.block] * 3)
    seen = captured(monitor)
    with monitor.step(0):
        for _ in range(2):
            model(torch.randn(2, 5, 8)).sum().backward()
    assert [s.shape for s in seen] == [(4, 2, 5, 8)] * 2


def test_states_after_the_final_norm() -> None:
    """`states="hf"` equals what transformers returns: h^(0..L−1), then the norm of h^(L)."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.LlamaForCausalLM(config).train()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, states="hf"))
    seen = captured(monitor)
    with monitor.step(0):
        output = model(input_ids=torch.arange(20).view(2, 10), output_hidden_states=True)
    assert torch.equal(seen[0], torch.stack(output.hidden_states))
    with pytest.raises(ValueError, match=r'states="hf" needs the norm behind the last block.*use states="residual"'):
        Monitor(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 2), MonitorConfig(states="hf"))


FAULTS = {
    "different widths": (
        lambda: nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 6))]),
        lambda model, x: model.blocks[1](model.blocks[0](x)),
        r"CaptureError: expected every state to be \[2, 5, 8\] like the first, got \[2, 5, 6\] from 'blocks\.1'",
    ),
    "no tokens": (
        lambda: nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)]),
        lambda model, x: model.blocks[1](model.blocks[0](x.unsqueeze(0))),
        r"expected states of shape \[B, T, D\], got \[1, 2, 5, 8\] at the input of 'blocks\.0'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_captured_is_said_once_and_training_goes_on(fault) -> None:
    blocks, forward, message = FAULTS[fault]
    model = nn.Module()
    model.blocks = blocks()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.warns(RuntimeWarning, match=message) as caught:
        for step in range(3):
            with monitor.step(step):
                forward(model, torch.randn(2, 5, 8)).sum().backward()
    assert len(caught) == 1 and "Training goes on" in str(caught[0].message)
    assert not monitor.enabled and hooks(model) == 0


def test_blocks_in_another_order_are_left_out_and_said() -> None:
    """So are forwards that skip a block, as LayerDrop does; the others are measured."""
    model: Any = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))

    def train(step: int, *order: int) -> None:
        x = torch.randn(2, 5, 8)
        with monitor.step(step):
            for index in order:
                x = model.blocks[index](x)
            x.sum().backward()
        monitor.flush()

    with pytest.warns(RuntimeWarning, match=r"1 forwards that ran 'blocks\.2' where 'blocks\.1' was expected"):
        train(0, 0, 2, 1)
    train(1, 0, 2)
    train(2, 0, 1, 2)
    assert monitor.enabled and monitor.latest is not None and monitor.latest.step == 2


def test_decoder_does_not_take_its_encoders_mask() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).train()
    source = torch.arange(36).view(3, 12)
    mask = torch.zeros(3, 12, dtype=torch.long)
    mask[:, :4] = 1
    for stream, tokens in (("encoder", 12), ("decoder", 24)):
        monitor = Monitor(model, MonitorConfig(every_n_steps=1), stream=stream)
        with monitor.step(0):
            model(input_ids=source, attention_mask=mask, labels=source[:, :8].contiguous()).loss.backward()
        monitor.flush()
        assert monitor.latest is not None and (monitor.latest.stream, monitor.latest.tokens) == (stream, tokens)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_documents_from_positions_that_start_again(padding) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.arange(48).view(2, 24)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    positions = torch.arange(8).repeat(2, 3)
    mask = None
    if padding != "none":
        mask = torch.ones_like(ids)
        mask[:, slice(3) if padding == "left" else slice(-3, None)] = 0
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with monitor.step(0):
        model(input_ids=ids, position_ids=positions, attention_mask=mask).logits.sum().backward()
    monitor.flush()
    assert monitor.latest is not None
    assert (monitor.latest.sequences, monitor.latest.tokens) == ((6, 48) if padding == "none" else (2, 42))


@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_transformer_encoder(batch_first) -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first), 2, enable_nested_tensor=False
    ).train()
    monitor = Monitor(encoder, MonitorConfig(every_n_steps=1))
    seen = captured(monitor)
    x = torch.randn(3, 12, 16)
    padding = torch.zeros(3, 12, dtype=torch.bool)
    padding[0, 5:] = True
    with monitor.step(0):
        encoder(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padding).sum().backward()
    monitor.flush()
    assert torch.equal(seen[0][0], x)
    assert monitor.latest is not None and (monitor.latest.sequences, monitor.latest.tokens) == (3, 29)


@pytest.mark.parametrize("tokens", [12, 16])
def test_torch_transformer_encoder_of_one_sequence(tokens: int) -> None:
    """Without a dimension for rows, `[T, D]`, also where T = D: nothing is transposed."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    x, states = torch.randn(tokens, 16), []
    handles = [block.register_forward_hook(lambda *call: states.append(call[2].detach())) for block in encoder.layers]
    encoder(x)
    for handle in handles:
        handle.remove()
    monitor = Monitor(encoder, MonitorConfig(every_n_steps=1))
    seen = captured(monitor)
    with monitor.step(0):
        encoder(x).sum().backward()
    monitor.flush()
    assert torch.equal(seen[0][:, 0], torch.stack([x, *states]))
    assert monitor.latest is not None and (monitor.latest.sequences, monitor.latest.tokens) == (1, tokens)


def test_a_micro_batch_without_a_token_is_left_out() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with monitor.step(0):
        model(toy.batch()[:0]).sum().backward()
        model(toy.batch()).sum().backward()
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 48


def test_another_default_device_does_not_matter() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1, max_tokens=10))
    ids = toy.batch()
    with torch.device("meta"), monitor.step(0):
        toy.loss_of(model, ids).backward()
    monitor.log(loss=1.0)
    with torch.device("meta"):
        monitor.flush()
    assert monitor.enabled and monitor.latest is not None and monitor.latest.tokens == 10


def test_a_mask_of_another_shape_says_what_to_pass() -> None:
    model = toy.Toy()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with (
        pytest.warns(RuntimeWarning, match=r"expected a mask of shape \[4, 12\] like the states, got \[4\]"),
        monitor.step(0, mask=torch.ones(4)),
    ):
        model(toy.batch()).sum().backward()
