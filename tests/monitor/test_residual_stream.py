"""The stream of every architecture that issue names, and of hand-written modules."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from repflow.monitor import Monitor, MonitorConfig, find_residual_stream
from repflow.monitor.residual_stream import strip_wrappers

SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48
)
MAMBA2 = dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16)
BAMBA = dict(
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_n_groups=1,
    mamba_chunk_size=16,
    attn_layer_indices=[1, 3],
    num_key_value_heads=2,
)
ATTENTION, SSM = ["attention"] * 4, ["ssm"] * 4
MODELS = {
    "GPTNeo": (dict(num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]), "transformer.h", ATTENTION),
    "GPTNeoX": ({}, "gpt_neox.layers", ATTENTION),
    "GPT2": (dict(n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2), "transformer.h", ATTENTION),
    "Llama": ({}, "model.layers", ATTENTION),
    "Mamba": (dict(state_size=4), "backbone.layers", SSM),
    "Mamba2": (MAMBA2, "backbone.layers", SSM),
    "Bamba": (BAMBA, "model.layers", ["ssm", "attention", "ssm", "attention"]),
}


def build(family: str) -> nn.Module:
    options = MODELS[family][0]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return getattr(transformers, name)(config)


@pytest.mark.parametrize("family", MODELS)
def test_blocks_and_kinds(family: str) -> None:
    model = build(family)
    stream = find_residual_stream(model)
    assert stream.name == MODELS[family][1]
    assert [block.kind for block in stream.blocks] == MODELS[family][2]
    assert [block.index for block in stream.blocks] == [0, 1, 2, 3]
    assert [block.module for block in stream.blocks] == list(model.get_submodule(stream.name).children())
    assert len(stream) == 4
    assert stream.final_norm is not None


@pytest.mark.parametrize("family", ["GPTNeo", "GPTNeoX", "GPT2", "Llama", "Bamba"])
def test_states_are_the_hidden_states_of_transformers(family: str) -> None:
    """h^(0..L−1) equal `output_hidden_states`, bit for bit; its last entry is after the final norm."""
    _compare_with_transformers(family, lambda states: states[:-1], lambda hidden: hidden[:-1])


@pytest.mark.parametrize("family", ["Mamba", "Mamba2"])
def test_states_of_mamba_are_shifted_by_one(family: str) -> None:
    """transformers leaves h^(0) out for these: its list starts at h^(1)."""
    _compare_with_transformers(family, lambda states: states[1:], lambda hidden: hidden[: len(hidden) - 1])


def _compare_with_transformers(family, ours, theirs) -> None:
    model, seen = build(family).eval(), []
    stream = find_residual_stream(model)
    first = stream.blocks[0]
    first.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(first.reader.entry(args, kwargs)), with_kwargs=True
    )
    for block in stream.blocks:
        block.module.register_forward_hook(
            lambda module, args, output, read=block.reader.exit: seen.append(read(output))
        )
    with torch.no_grad():
        hidden = model(input_ids=torch.arange(20).view(2, 10), output_hidden_states=True).hidden_states
    mine, reference = ours(seen), theirs(hidden)
    assert len(seen) == 5 and len(mine) == len(reference) >= 4
    assert all(torch.equal(a, b) for a, b in zip(mine, reference, strict=True))


def test_encoder_decoder_needs_a_stream() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r'stream="encoder" or stream="decoder".*encoder\.block.*decoder\.block'):
        find_residual_stream(model)
    stream = find_residual_stream(model, stream="encoder")
    assert (stream.name, len(stream), stream.blocks[0].name) == ("encoder", 1, "encoder.block.0")
    with pytest.raises(ValueError, match=r"no stream 'middle'.*it has 'encoder\.block'"):
        find_residual_stream(model, stream="middle")


class HandWritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(4, 8) for _ in range(6)])
        self.trunk = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)])
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)


def test_a_decoder_that_is_made_of_an_encoder() -> None:
    """The first of the two names in a path counts."""
    bert = transformers.BertConfig(**{**SMALL, "num_hidden_layers": 2})
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    model = transformers.EncoderDecoderModel(config)
    with pytest.raises(ValueError, match=r"'encoder\.encoder\.layer' .*'decoder\.bert\.encoder\.layer'"):
        find_residual_stream(model)
    assert find_residual_stream(model, stream="encoder").blocks[1].name == "encoder.encoder.layer.1"
    assert find_residual_stream(model, stream="decoder").blocks[1].name == "decoder.bert.encoder.layer.1"


def blocks_of(number: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(number)])


def test_other_modalities_are_passed_over() -> None:
    """Also when they are deeper than the model of language, and have an encoder."""
    model = nn.Module()
    model.vision_tower = nn.Module()
    model.vision_tower.encoder = blocks_of(6)
    model.decoder = blocks_of(2)
    assert find_residual_stream(model).name == "decoder"
    assert find_residual_stream(model, stream="vision_tower").blocks[5].name == "vision_tower.encoder.5"
    del model.decoder
    assert find_residual_stream(model).name == "vision_tower.encoder"


def test_blocks_that_are_lists_are_never_called() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([blocks_of(2) for _ in range(3)])
    with pytest.raises(ValueError, match=r"parts of blocks in 'layers', which are lists.*make each block a module"):
        find_residual_stream(model)


def test_longest_list_with_an_inner_structure() -> None:
    stream = find_residual_stream(HandWritten())
    assert stream.name == "trunk"
    assert [block.kind for block in stream.blocks] == ["other"] * 3


def test_sequential_without_a_module_list() -> None:
    model = nn.Sequential(
        nn.Embedding(4, 8), nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))), nn.Linear(8, 4)
    )
    assert find_residual_stream(model).name == "1"


def test_a_model_that_is_one_sequential() -> None:
    """As pipelines have it: embedding, norm and head are no blocks, unless the list is named as that of the blocks."""
    model = nn.Sequential(nn.Embedding(4, 2), *blocks_of(3), nn.LayerNorm(2), nn.Linear(2, 4))
    assert [block.name for block in find_residual_stream(model).blocks] == ["1", "2", "3"]
    holder = nn.Module()
    holder.net = model
    assert len(find_residual_stream(holder, "net")) == 6


def test_torch_transformer_encoder() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 3)
    stream = find_residual_stream(encoder)
    assert (stream.name, [block.kind for block in stream.blocks]) == ("layers", ATTENTION[:3])


@pytest.mark.parametrize(("stream", "tokens"), [("encoder", 29), ("decoder", 22)])
def test_torch_transformer(stream: str, tokens: int) -> None:
    """Each side by its own padding, `[T, B, D]`."""
    model = nn.Transformer(16, 2, 2, 2, 32).train()
    monitor = Monitor(model, MonitorConfig(every_n_steps=1), stream=stream)
    padding = {"src": torch.zeros(3, 12, dtype=torch.bool), "tgt": torch.zeros(3, 8, dtype=torch.bool)}
    padding["src"][0, 5:] = padding["tgt"][1, 6:] = True
    masks = {f"{name}_key_padding_mask": mask for name, mask in padding.items()}
    with monitor.step(0):
        model(torch.randn(12, 3, 16), torch.randn(8, 3, 16), **masks).sum().backward()
    monitor.flush()
    assert monitor.latest is not None and (monitor.latest.sequences, monitor.latest.tokens) == (3, tokens)


def test_evaluation_takes_the_fast_path_of_torch_transformer_encoder_between_sampled_steps() -> None:
    """Hooks on its layers turn that path off: between sampled steps there must be none."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    padding = torch.arange(12).expand(3, -1) >= torch.tensor([[5], [12], [9]])
    x = torch.randn(3, 12, 16)

    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            return encoder.eval()(x, src_key_padding_mask=padding)

    bare = evaluate()
    monitor = Monitor(encoder, MonitorConfig(every_n_steps=2))
    for step in range(2):
        with monitor.step(step):
            encoder.train()(x, src_key_padding_mask=padding).sum().backward()
            if step:
                assert torch.equal(evaluate(), bare)
    assert torch.equal(evaluate(), bare)
    monitor.flush()
    assert monitor.latest is not None and monitor.latest.tokens == 5 + 12 + 9


def test_blocks_as_a_path_and_as_modules() -> None:
    model = HandWritten()
    assert find_residual_stream(model, "trunk").blocks[2].name == "trunk.2"
    stream = find_residual_stream(model, [model.second, model.first])
    assert [block.name for block in stream.blocks] == ["second", "first"]


def test_wrappers_leave_no_trace_in_names() -> None:
    model = torch.compile(build("GPT2"), backend="eager")
    assert isinstance(model, nn.Module)
    stream = find_residual_stream(model)
    assert stream.name == "transformer.h" and stream.blocks[1].name == "transformer.h.1"
    assert find_residual_stream(model, "transformer.h").blocks[1].name == "transformer.h.1"
    assert strip_wrappers("module._orig_mod.model.layers.0._fsdp_wrapped_module") == "model.layers.0"


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ("trnk", ValueError, r"no module 'trnk' in HandWritten; nearest: 'trunk'"),
        ("first", ValueError, r"expected 'first' to be a list of blocks .* got Linear"),
        (["trunk.0"], TypeError, r"a dotted path or a list of modules, got \['str'\]"),
        ([], TypeError, r"a dotted path or a list of modules, got \[\]"),
        ([nn.Linear(8, 8)], ValueError, r"blocks \[0\] are not modules of HandWritten"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_errors_of_blocks(blocks, error, message) -> None:
    with pytest.raises(error, match=message):
        find_residual_stream(HandWritten(), blocks)


def test_error_of_an_unknown_structure_tells_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"expected a list of blocks in Linear, found no ModuleList.*blocks="):
        find_residual_stream(nn.Linear(2, 2))


def test_error_of_two_lists_alike() -> None:
    model = nn.Module()
    model.left = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])
    model.right = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])
    with pytest.raises(ValueError, match=r"several lists of 2 blocks: 'left'.*'right'.*blocks=\"left\""):
        find_residual_stream(model)
