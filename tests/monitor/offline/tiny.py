"""A small tokenizer that is really trained, and small models that are really saved and loaded."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from repflow.monitor.offline.tasks_kvpr import KeyValueRetrieval
from tests.monitor.offline import questions

VOCABULARY = 384
WINDOW = 512

_SIZES: dict[str, dict[str, Any]] = {
    "gpt_neo": {
        "num_layers": 3, "num_heads": 2, "attention_types": [[["global"], 3]], "max_position_embeddings": WINDOW,
        "window_size": 64,
    },
    "gpt_neox": {
        "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": WINDOW,
    },
    "mamba": {"num_hidden_layers": 3, "state_size": 4, "time_step_rank": 4},
    "mamba2": {
        "num_hidden_layers": 3, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 32,
    },
}  # fmt: skip
KINDS = tuple(_SIZES)


def config(kind: str, **changes: Any) -> Any:
    """Three blocks of 32 features, of one of the paper's four families."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return transformers.AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=32, **ends, **_SIZES[kind] | changes
    )


@cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, trained on prompts; it puts nothing in front and nothing behind."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [record["ctxs"][1]["text"] for record in questions.records()]  # pyright: ignore[reportIndexIssue]
    made.train_from_iterator([*texts, *(KeyValueRetrieval(items=4).sample(i).prompt for i in range(20))], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def with_ends() -> transformers.PreTrainedTokenizerFast:
    """The same, with a special token in front and another behind."""
    made = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|end|> $A <|end|>", special_tokens=[("<|end|>", made.token_to_id("<|end|>"))]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def save(folder: Path, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A checkpoint of a causal language model with its head and tokenizer, as the hub has them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config(kind, **changes), dtype=dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
