"""The matrix: every architecture, with padding, with and without checkpointing, with and without the monitor."""

from dataclasses import replace

import peft
import pytest
import torch
import transformers
from torch import nn

from tests import handwritten
from tests.architectures import ARCHITECTURES, ATTENTION, GROUPED, SMALL, VOCABULARY, Architecture, plain
from tests.matrix import Trained, examine
from tests.models_page import PAGE, page

GOOD = Trained(states=True, losses=True, snapshot=True, padding=True)
WITHOUT_CHECKPOINTING = ("torch.nn.TransformerEncoder", "torch.nn.TransformerEncoder, batch_first=True")


def by_name(architecture: Architecture) -> str:
    return architecture.name


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=by_name)
def test_architecture(architecture: Architecture) -> None:
    result = examine(architecture)
    if architecture.missing:
        assert result.missing and result.plain is None
        return
    assert (result.path, list(result.kinds)) == (architecture.path, list(architecture.kinds))
    assert result.parts == tuple(architecture.parts)
    assert result.plain == GOOD
    assert result.checkpointed == (None if architecture.name in WITHOUT_CHECKPOINTING else GOOD)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.classes], ids=by_name)
def test_states_in_the_convention_of_transformers(architecture: Architecture) -> None:
    family = architecture.name.partition("For")[0]
    expected = {
        **dict.fromkeys(("Mamba", "Mamba2", "FalconMamba"), "h1 … hL, norm(hL)"),
        "Bert": "h0 … hL",
    }.get(family, "h0 … h(L−1), norm(hL)")
    assert examine(architecture).hidden_states == ("" if architecture.missing else expected)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(map(examine, ARCHITECTURES)), "run: python -m tests.models_page"


def test_a_class_that_transformers_lacks_is_listed() -> None:
    result = examine(replace(ARCHITECTURES[0], name="Future", classes=("FutureForCausalLM", "GPT2Config")))
    assert result.missing == "FutureForCausalLM"
    assert "| Future | transformers " in page([result]) and "has no FutureForCausalLM" in page([result])


def own(**options) -> Architecture:
    return plain("own", lambda: handwritten.Plain(VOCABULARY), "blocks", ["other"] * 3, **options)


class Drifting(handwritten.Plain):
    """Adds to the stream between its blocks."""

    def run(self, block, *args, **kwargs):
        return super().run(block, args[0] + 1, **kwargs)


def test_the_matrix_sees_what_is_wrong() -> None:
    """States that are others, a mask that is not heeded, and a stream that is no chain."""
    result = examine(own(returned=lambda output: output + 1e-6))
    assert result.plain == replace(GOOD, states=False)
    assert "| **no** | yes | yes | **no** |" in page([result])
    assert examine(own(mask=lambda ids, mask: torch.ones_like(mask))).plain == replace(GOOD, padding=False)
    drifting = plain("drifting", lambda: Drifting(VOCABULARY), "blocks", ["other"] * 3)
    with pytest.warns(RuntimeWarning, match=r"'blocks\.1' did not take what 'blocks\.0' returned"):
        assert examine(drifting).plain == Trained(states=False, losses=True, snapshot=False, padding=False)


def lora() -> nn.Module:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **GROUPED}))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.1)
    return peft.get_peft_model(model, config)


def test_peft_itself() -> None:
    """As its stand-in in the matrix."""
    result = examine(plain("PEFT", lora, "base_model.model.model.layers", [ATTENTION] * 3))
    assert (result.plain, result.checkpointed) == (GOOD, GOOD)
    assert result.parts == (ATTENTION,) * 3
