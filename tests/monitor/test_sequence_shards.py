"""The width of the states is told before the first forward, as ranks need that share sequences.

What ranks do together is in `test_ranks`.
"""

from typing import Any

import pytest
import transformers
from torch import nn

from repflow.monitor import find_residual_stream
from repflow.monitor.sequence_shards import stream_width
from tests.monitor import toy


def small(config: type, **sizes: int) -> Any:
    return transformers.AutoModel.from_config(config(vocab_size=32, **sizes))


MODELS = {
    "Llama": lambda: small(
        transformers.LlamaConfig, hidden_size=24, intermediate_size=8, num_attention_heads=2, num_hidden_layers=3
    ),
    "norms of heads come first": lambda: nn.ModuleDict(  # no config in it
        {
            "layers": small(
                transformers.Qwen3Config,
                **{"hidden_size": 24, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2},
                head_dim=6,
                num_hidden_layers=3,
            ).layers
        }
    ),
    "GPT-2": lambda: small(transformers.GPT2Config, n_embd=24, n_head=2, n_layer=3),
    "T5": lambda: small(transformers.T5Config, d_model=24, d_ff=8, d_kv=4, num_heads=2, num_layers=3),
    "Mamba": lambda: small(transformers.MambaConfig, hidden_size=24, num_hidden_layers=3),
    "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 8), 3),
    "final norm": lambda: toy.Toy(width=24),
}


@pytest.mark.parametrize("name", MODELS)
def test_width_is_told_without_a_forward(name: str) -> None:
    model = MODELS[name]()
    stream = find_residual_stream(model, stream="encoder" if name == "T5" else None)
    assert stream_width(stream) == 24


def test_no_width_is_told_of_a_model_without_norm_and_config() -> None:
    model = toy.Toy()
    model.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    assert stream_width(find_residual_stream(model)) is None
