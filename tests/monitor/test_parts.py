"""What blocks are made of, where names alone mislead."""

import pytest
import torch
from torch import nn

from repflow.monitor.parts import block_kind, block_parts


def module(class_name: str = "Part", *, parameters: str = "", **children: nn.Module) -> nn.Module:
    """A module of a class of that name."""
    made = type(class_name, (nn.Module,), {})()
    for name in parameters.split():
        made.register_parameter(name, nn.Parameter(torch.zeros(1)))
    for name, child in children.items():
        made.add_module(name, child)
    return made


def linear() -> nn.Module:
    return nn.Linear(2, 2)


BLOCKS = {
    "projections of a DeltaNet are no attention": (
        module(linear_attn=module("GatedDeltaNet", parameters="A_log", q_proj=linear()), mlp=linear()),
        ("recurrent", "mlp"),
    ),
    "DeltaNet without a name": (module(mixer=module("KimiDeltaAttention", q_proj=linear())), ("recurrent",)),
    "RWKV calls its recurrence attention": (
        module(attention=module("RwkvSelfAttention", parameters="time_decay"), feed_forward=linear()),
        ("recurrent", "mlp"),
    ),
    "two mixers in one module": (
        module(mixer=module(ssm=module(parameters="A_log", conv=linear()), attn=module(q_proj=linear()))),
        ("attention", "ssm"),
    ),
    "everything in the block itself": (
        module(parameters="A_log", q_proj=linear(), mlp=linear()),
        ("attention", "ssm", "mlp"),
    ),
    "experts in what is called mlp": (
        module(self_attn=module(q_proj=linear()), mlp=module(experts=module(up_proj=linear()), shared_expert=linear())),
        ("attention", "moe"),
    ),
    "experts beside an mlp": (module(block_sparse_moe=module(experts=linear()), shared_mlp=linear()), ("moe", "mlp")),
    "attention of mamba_ssm": (module(mixer=module("MHA", in_proj=linear()), norm=linear()), ("attention",)),
    "attention of mamba_ssm under FSDP2": (module(mixer=module("FSDPMHA", in_proj=linear())), ("attention",)),
    "Mamba3, whose A depends on the data": (module(mixer=module("Mamba3", in_proj=linear())), ("ssm",)),
    "a mixer whose parameters FSDP1 flattened": (
        module("Mamba2Block", mixer=module("FalconMambaMixer", parameters="_flat_param", in_proj=linear())),
        ("ssm",),
    ),
    "wrapped": (
        module(_checkpoint_wrapped_module=module(mixer=module(_fsdp_wrapped_module=module("MHA")), mlp=linear())),
        ("attention", "mlp"),
    ),
    "nothing that is known": (module(f=linear()), ()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_parts(name: str) -> None:
    block, expected = BLOCKS[name]
    assert block_parts(block) == expected


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        (("attention", "mlp"), "attention"),
        (("attention", "ssm", "mlp"), "hybrid"),
        (("conv", "mlp"), "conv"),
        (("moe", "mlp"), "moe"),
        ((), "other"),
    ],
)
def test_kind(parts: tuple[str, ...], kind: str) -> None:
    assert block_kind(parts) == kind
