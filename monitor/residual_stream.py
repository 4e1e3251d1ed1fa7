"""Where a model's residual stream runs: its blocks in order, what each is made of, and how to read h^(l) from them.

What is known about architectures is data here: names of parts, of final norms, of wrappers, and small readers. The list
of blocks itself is found by structure, so that a new architecture usually needs nothing.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module, ModuleList, Sequential

PART_NAMES: dict[str, frozenset[str]] = {
    part: frozenset(names.split())
    for part, names in {
        "attention": "q_proj query query_key_value qkv qkv_proj Wqkv c_attn wq in_proj_weight "
        "attn attention self_attn self_attention SelfAttention",
        "ssm": "A_log",
        "recurrent": "rg_lru mlstm_layer mlstm slstm linear_attn time_mix",
        "conv": "conv",
        "moe": "experts router block_sparse_moe",
        "mlp": "mlp feed_forward ffn fc1 c_fc linear1 up_proj shared_mlp DenseReluDense intermediate",
    }.items()
}
"""Parts of a block, told by the names of its modules and parameters: class names and configs do not separate them."""

MIXERS = ("attention", "ssm", "recurrent", "conv")
"""The parts that mix tokens. A block with two of them is a hybrid; a block with none is named after what it has."""

FINAL_NORMS = (
    "final_layer_norm",
    "final_layernorm",
    "final_norm",
    "ln_f",
    "norm_f",
    "norm",
    "out_norm",
    "embedding_norm",
)
"""Names of the norm behind the last block, beside the list of blocks."""

WRAPPERS = frozenset(["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
"""Components that wrappers (DDP, torch.compile, FSDP, activation checkpointing) put into module names."""


@dataclass(frozen=True)
class Reader:
    """How to read the residual stream at a block's ends."""

    entry: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]
    """From the arguments of a block's forward to its input state."""
    exit: Callable[[Any], Tensor]
    """From what a block returns to its output state."""


def _first_tensor_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = [kwargs[name] for name in ("hidden_states", "x", "src", "tgt", "input") if name in kwargs]
    for value in (*args[:1], *named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    got = [type(value).__name__ for value in (*args, *kwargs.values())]
    raise TypeError(f"expected a block that takes its state as a floating tensor, got arguments {got}")


def _first_tensor_out(output: Any) -> Tensor:
    first = output
    while isinstance(first, (tuple, list)) and first:
        first = first[0]
    if not (isinstance(first, Tensor) and first.is_floating_point()):
        raise TypeError(
            "expected a block that returns its state as a floating tensor, or first in a tuple, "
            f"got {type(output).__name__}"
        )
    return first


FIRST_TENSOR = Reader(_first_tensor_in, _first_tensor_out)
"""The state is the first argument, and the output or the first of its tuple, as in all blocks of transformers."""

SEQUENCE_FIRST = Reader(
    lambda args, kwargs: _first_tensor_in(args, kwargs).transpose(0, 1),
    lambda output: _first_tensor_out(output).transpose(0, 1),
)
"""States are `[T, B, D]`: torch.nn.TransformerEncoderLayer and its kin, unless made with `batch_first=True`."""

READERS: list[tuple[Callable[[Module], bool], Reader]] = [
    (lambda block: getattr(getattr(block, "self_attn", None), "batch_first", True) is False, SEQUENCE_FIRST),
]
"""Blocks that need another reader: the first whose test holds for a block is used."""


@dataclass(frozen=True)
class Block:
    """One block of a residual stream."""

    index: int
    """Position, from 0; block l turns h^(l) into h^(l+1)."""
    name: str
    """Dotted path in the model, without what wrappers add."""
    kind: str
    """What mixes its tokens: `attention`, `ssm`, `recurrent`, `conv`, or `hybrid`; else `moe`, `mlp` or `other`."""
    module: Module = field(repr=False)
    """The block itself."""
    parts: tuple[str, ...]
    """Everything found in it, such as `("attention", "mlp")`."""
    reader: Reader = field(repr=False)
    """How to read its states."""


@dataclass(frozen=True)
class ResidualStream:
    """The blocks that a model's tokens flow through, in order."""

    name: str
    """`encoder` or `decoder` in a model with both, otherwise the path of the list of blocks."""
    blocks: tuple[Block, ...]
    """The L blocks; the stream has S = L + 1 states."""
    ancestors: tuple[Module, ...] = field(repr=False)
    """The modules on the path from the model to the list of blocks, both included."""
    final_norm: Module | None = field(repr=False)
    """The norm behind the last block, if one was found."""

    def __len__(self) -> int:
        """Number of blocks L."""
        return len(self.blocks)


@dataclass(frozen=True)
class _Candidate:
    """A list that may be the list of blocks."""

    path: str
    items: list[tuple[str, Module]]

    @property
    def name(self) -> str:
        return strip_wrappers(self.path) or "model"

    def __str__(self) -> str:
        return f"'{self.name}' ({len(self.items)} × {type(self.items[0][1]).__name__})"


def find_residual_stream(
    model: Module, blocks: str | Sequence[Module] | None = None, *, stream: str | None = None
) -> ResidualStream:
    """Find the blocks of `model`.

    Without `blocks`, they are the longest list of modules that is not itself inside such a list.

    Args:
        model: any module, wrapped or not.
        blocks: dotted path of the list of blocks (`"transformer.h"`), or the blocks themselves in the order in which
            they run.
        stream: which one, in a model with several: `"encoder"`, `"decoder"`, or another component of the path.

    Raises:
        ValueError: no list of blocks, several that fit equally well, or a path that does not exist.
        TypeError: `blocks` that are not modules.
    """
    if isinstance(blocks, str):
        chosen = _named_candidate(model, blocks)
    elif blocks is not None:
        chosen = _given_candidate(model, blocks)
    else:
        chosen = _choose(model, list(_candidates(model)), stream)
    ancestors = tuple(model.get_submodule(path) for path in _prefixes(chosen.path))
    owner = next(module for module in reversed(ancestors) if not isinstance(module, ModuleList))
    norms = (getattr(owner, name, None) for name in FINAL_NORMS)
    return ResidualStream(
        name=stream or chosen.name,
        blocks=tuple(_block(index, path, module) for index, (path, module) in enumerate(chosen.items)),
        ancestors=ancestors,
        final_norm=next((norm for norm in norms if isinstance(norm, Module)), None),
    )


def block_parts(module: Module) -> tuple[str, ...]:
    """What a block is made of, in the order of `PART_NAMES`."""
    names = {part for path, _ in (*module.named_modules(), *module.named_parameters()) for part in path.split(".")}
    found = {part for part, known in PART_NAMES.items() if names & known}
    if "ssm" in found and any("delta" in type(child).__name__.lower() for child in module.modules()):
        found = found - {"ssm"} | {"recurrent"}  # DeltaNet has an A_log too
    return tuple(part for part in PART_NAMES if part in found)


def strip_wrappers(path: str) -> str:
    """A dotted path without the components of `WRAPPERS`."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def _block(index: int, path: str, module: Module) -> Block:
    parts = block_parts(module)
    mixers = [part for part in parts if part in MIXERS]
    kind = "hybrid" if len(mixers) > 1 else (*mixers, *parts, "other")[0]
    reader = next((reader for fits, reader in READERS if fits(module)), FIRST_TENSOR)
    return Block(index, strip_wrappers(path), kind, module, parts, reader)


def _candidates(model: Module) -> Iterator[_Candidate]:
    """Outermost lists of modules that have parameters: ModuleLists, and in their absence Sequentials."""
    for container in (ModuleList, Sequential):
        found: list[_Candidate] = []
        for path, module in model.named_modules():
            if not isinstance(module, container) or any(
                path.startswith(f"{other.path}.") for other in found if other.path
            ):
                continue
            items = [(f"{path}.{name}" if path else name, item) for name, item in module.named_children()]
            if items and all(_is_block(item) for _, item in items):
                found.append(_Candidate(path, items))
        if found:
            yield from found
            return


def _is_block(module: Module) -> bool:
    return not isinstance(module, ModuleList) and next(module.parameters(), None) is not None


def _choose(model: Module, candidates: list[_Candidate], stream: str | None) -> _Candidate:
    kind = type(model).__name__
    if not candidates:
        raise ValueError(
            f"`find_residual_stream`: expected a list of blocks in {kind}, found no ModuleList of modules with "
            'parameters; pass blocks="dotted.path" or blocks=[module, ...] in the order in which they run'
        )
    listing = ", ".join(map(str, candidates))
    sides = [side for side in ("encoder", "decoder") if any(side in c.path.split(".") for c in candidates)]
    if stream is not None:
        candidates = [c for c in candidates if stream in c.path.split(".") or stream == c.name]
        if not candidates:
            raise ValueError(f"`find_residual_stream`: no stream {stream!r} in {kind}; it has {listing}")
    elif len(sides) == 2:
        raise ValueError(
            f'`find_residual_stream`: {kind} has two streams; pass stream="encoder" or stream="decoder". '
            f"It has {listing}"
        )
    # Lists of bare layers (heads, embeddings) only count where there is nothing with an inner structure.
    structured = [c for c in candidates if all(next(item.children(), None) is not None for _, item in c.items)]
    candidates = structured or candidates
    longest = max(len(c.items) for c in candidates)
    best = [c for c in candidates if len(c.items) == longest]
    if len(best) > 1:
        raise ValueError(
            f"`find_residual_stream`: {kind} has several lists of {longest} blocks: {', '.join(map(str, best))}; "
            f'pass the right one, for example blocks="{best[0].name}"'
        )
    return best[0]


def _named_candidate(model: Module, path: str) -> _Candidate:
    by_name = {strip_wrappers(name): (name, module) for name, module in model.named_modules()}
    if path not in by_name:
        near = ", ".join(map(repr, difflib.get_close_matches(path, by_name, n=3, cutoff=0.3)))
        raise ValueError(
            f"`find_residual_stream`: no module {path!r} in {type(model).__name__}; nearest: {near or 'none'}"
        )
    full, module = by_name[path]
    items = [(f"{full}.{name}" if full else name, item) for name, item in module.named_children()]
    if not isinstance(module, (ModuleList, Sequential)) or not items:
        raise ValueError(
            f"`find_residual_stream`: expected {path!r} to be a list of blocks (ModuleList or Sequential with items), "
            f"got {type(module).__name__} with {len(items)} children"
        )
    return _Candidate(full, items)


def _given_candidate(model: Module, blocks: Sequence[Module]) -> _Candidate:
    blocks = list(blocks)
    if not blocks or not all(isinstance(block, Module) for block in blocks):
        got = [type(block).__name__ for block in blocks]
        raise TypeError(f"`find_residual_stream`: expected blocks as a dotted path or a list of modules, got {got}")
    names = {id(module): name for name, module in model.named_modules()}
    missing = [index for index, block in enumerate(blocks) if id(block) not in names]
    if missing:
        raise ValueError(f"`find_residual_stream`: blocks {missing} are not modules of {type(model).__name__}")
    items = [(names[id(block)], block) for block in blocks]
    return _Candidate(_common_parent([name for name, _ in items]), items)


def _common_parent(paths: list[str]) -> str:
    split = [path.split(".")[:-1] for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _prefixes(path: str) -> list[str]:
    """Every prefix of a dotted path, from the empty one to the path itself."""
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
