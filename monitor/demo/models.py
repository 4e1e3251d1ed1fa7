"""The demo's models: three families in three sizes, built from configurations with random weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from repflow.monitor.demo import DemoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 256
"""One entry per byte."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How models of one size are trained."""

    sequence: int
    """Bytes per sequence."""
    batch: int
    """Sequences per step."""
    steps: int
    """Optimizer steps of a full run."""
    quick_steps: int
    """Optimizer steps under `--quick`."""
    learning_rate: float
    """Peak learning rate, reached after a tenth of the steps and followed by a cosine to a tenth of it."""


@dataclass(frozen=True, kw_only=True)
class DemoModel:
    """One model of the demo: a transformers causal language model and the settings of its configuration."""

    name: str
    """What `--model` calls it, and the stem of its run file."""
    family: str
    """Stem of the transformers classes: `<family>Config`, `<family>ForCausalLM`."""
    settings: Mapping[str, Any]
    """Arguments of the configuration, beside the vocabulary."""

    def build(self) -> "PreTrainedModel":
        """The model with random weights drawn from torch's global generator."""
        import transformers

        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # all 256 bytes are text
        config = getattr(transformers, f"{self.family}Config")(vocab_size=VOCABULARY, **special, **self.settings)
        return getattr(transformers, f"{self.family}ForCausalLM")(config)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "small": Recipe(sequence=256, batch=8, steps=120, quick_steps=22, learning_rate=3e-3),
        "medium": Recipe(sequence=512, batch=16, steps=600, quick_steps=100, learning_rate=1e-3),
        "large": Recipe(sequence=512, batch=16, steps=600, quick_steps=100, learning_rate=5e-4),
    }
)


def _transformer(*, width: int, blocks: int, heads: int) -> DemoModel:
    return DemoModel(
        name="transformer",
        family="GPTNeoX",
        settings={
            "hidden_size": width,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
        },
    )


def _ssm(*, width: int, blocks: int, head: int, state: int) -> DemoModel:
    return DemoModel(
        name="ssm",
        family="Mamba2",
        settings={
            "hidden_size": width,
            "num_hidden_layers": blocks,
            "head_dim": head,
            "num_heads": 2 * width // head,
            "state_size": state,
            "n_groups": 1,
            # Without fused kernels the work within a chunk is quadratic in it; 32 is the fastest on a CPU.
            "chunk_size": 32,
            # The library's default of 0.1 starts at a loss well above that of guessing all bytes alike.
            "initializer_range": 0.02,
        },
    )


def _hybrid(*, width: int, blocks: int, heads: int, attention: tuple[int, ...], head: int, state: int) -> DemoModel:
    return DemoModel(
        name="hybrid",
        family="Bamba",
        settings={
            "hidden_size": width,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": 2 * width,
            "attn_layer_indices": list(attention),
            "mamba_d_head": head,
            "mamba_n_heads": 2 * width // head,
            "mamba_d_state": state,
            "mamba_chunk_size": 32,
        },
    )


MODELS: Mapping[str, tuple[DemoModel, ...]] = MappingProxyType(
    {
        "small": (  # 1.4 – 1.7 M parameters
            _transformer(width=128, blocks=8, heads=4),
            _ssm(width=160, blocks=8, head=80, state=32),
            _hybrid(width=128, blocks=8, heads=4, attention=(2, 6), head=64, state=32),
        ),
        "medium": (  # about 30 M
            _transformer(width=512, blocks=10, heads=8),
            _ssm(width=640, blocks=12, head=64, state=64),
            _hybrid(width=512, blocks=10, heads=8, attention=(3, 7), head=64, state=64),
        ),
        "large": (  # about 160 M
            _transformer(width=768, blocks=22, heads=12),
            _ssm(width=1024, blocks=24, head=64, state=128),
            _hybrid(width=768, blocks=22, heads=12, attention=(4, 10, 16), head=64, state=128),
        ),
    }
)


def choose_models(names: Sequence[str], size: str) -> list[DemoModel]:
    """The models of a size, or those of them that are named, in the order of the table.

    Raises:
        DemoError: an unknown size or name; the message lists the known ones.
    """
    if size not in MODELS:
        raise DemoError(f"--size: expected one of {', '.join(MODELS)}, got {size!r}")
    models = MODELS[size]
    known = [model.name for model in models]
    for name in names:
        if name not in known:
            raise DemoError(f"--model: expected one of {', '.join(known)}, got {name!r}")
    return [model for model in models if not names or model.name in names]
