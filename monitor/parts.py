"""What a block is made of: its parts and its kind, told by the names of its modules and parameters."""

import re

from torch.nn import Module

from repflow.monitor.wrappers import unwrap

PART_NAMES: dict[str, frozenset[str]] = {
    part: frozenset(names.split())
    for part, names in {
        "attention": "q_proj query query_key_value qkv qkv_proj Wqkv c_attn wq in_proj_weight "
        "attn attention self_attn self_attention SelfAttention",
        "ssm": "A_log mamba",
        "recurrent": "rg_lru mlstm_layer mlstm slstm linear_attn time_mix time_decay",
        "conv": "conv",
        "moe": "experts router block_sparse_moe",
        "mlp": "mlp feed_forward ffn fc1 c_fc linear1 up_proj shared_mlp DenseReluDense intermediate",
    }.items()
}
"""Parts of a block by the names of modules and parameters; configs do not separate them."""

PART_CLASSES: dict[str, re.Pattern[str]] = {
    "attention": re.compile(r"^(FSDP)?MHA$"),
    "ssm": re.compile(r"Mamba\d*(Mixer)?$"),
    "recurrent": re.compile(r"Delta(Net|Attention|Product|Rule)?\d*$"),
}
"""Classes that their names inside do not tell, or no longer do once FSDP flattened the parameters."""

MIXERS = ("attention", "ssm", "recurrent", "conv")
"""The parts that mix tokens. A block with two of them is a hybrid; a block with none is named after what it has."""

_OWNED = {"ssm": {"attention", "conv"}, "recurrent": {"ssm", "attention", "conv"}}
"""What a mixer is not, whatever the projections inside of it are called: DeltaNet has queries, and an `A_log` too."""


def block_parts(block: Module) -> tuple[str, ...]:
    """What a block is made of, in the order of `PART_NAMES`."""
    found = _parts("", block)
    return tuple(part for part in PART_NAMES if part in found)


def block_kind(parts: tuple[str, ...]) -> str:
    """What mixes the tokens of a block with these parts; `hybrid` for several, else the first part, or `other`."""
    mixers = [part for part in parts if part in MIXERS]
    return "hybrid" if len(mixers) > 1 else (*mixers, *parts, "other")[0]


def _parts(name: str, module: Module) -> set[str]:
    """Parts of a module called `name` and of those in it. The block itself has no name: it may hold several mixers."""
    module = unwrap(module)
    names = {name, *(held for held, _ in module.named_parameters(recurse=False))}
    found = {part for part, known in PART_NAMES.items() if names & known}
    if name:
        found |= {part for part, pattern in PART_CLASSES.items() if pattern.search(type(module).__name__)}
    foreign = set[str]().union(*(_OWNED.get(part, ()) for part in found)) if name else set[str]()
    children = dict(module.named_children())
    if name and PART_NAMES["moe"] & children.keys():
        foreign.add("mlp")  # the experts, in a module that is called `mlp`
    for child_name, child in children.items():
        found |= _parts(child_name, child)
    return found - foreign
