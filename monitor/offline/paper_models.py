"""The models of the paper: their names on the Hugging Face hub, and their sizes, for use without their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PaperModel:
    """One model of the paper."""

    hub: str
    """Name on the hub of weights that transformers reads."""
    model_type: str
    """Of transformers; what `sizes` leaves out is the default of its configuration."""
    sizes: Mapping[str, Any]


PAPER_MODELS: dict[str, PaperModel] = {
    "gpt-neo-2.7b": PaperModel(
        "EleutherAI/gpt-neo-2.7B",
        "gpt_neo",
        {
            "vocab_size": 50257,
            "hidden_size": 2560,
            "num_layers": 32,
            "num_heads": 20,
            "attention_types": [[["global", "local"], 16]],
            "window_size": 256,
            "max_position_embeddings": 2048,
        },
    ),
    "pythia-2.8b": PaperModel(
        "EleutherAI/pythia-2.8b",
        "gpt_neox",
        {
            "vocab_size": 50304,
            "hidden_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 10240,
            "max_position_embeddings": 2048,
            "use_parallel_residual": True,
        },
    ),
    "mamba-2.8b": PaperModel(
        "state-spaces/mamba-2.8b-hf",
        "mamba",
        {
            "vocab_size": 50280,
            "hidden_size": 2560,
            "num_hidden_layers": 64,
            "state_size": 16,
            "expand": 2,
            "time_step_rank": 160,
            "residual_in_fp32": True,
        },
    ),
    "mamba2-2.7b": PaperModel(
        "AntonV/mamba2-2.7b-hf",
        "mamba2",
        {
            "vocab_size": 50288,
            "hidden_size": 2560,
            "num_hidden_layers": 64,
            "state_size": 128,
            "expand": 2,
            "num_heads": 80,
            "head_dim": 64,
            "n_groups": 1,
            "residual_in_fp32": True,
        },
    ),
    "mamba2-130m": PaperModel(
        "AntonV/mamba2-130m-hf",
        "mamba2",
        {
            "vocab_size": 50288,
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "state_size": 128,
            "expand": 2,
            "num_heads": 24,
            "head_dim": 64,
            "n_groups": 1,
            "residual_in_fp32": True,
        },
    ),
}
"""By the name that the paper gives them, in small letters. Its Pythia is called 2.7B in one place, 2.8B elsewhere."""
