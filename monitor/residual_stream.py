"""Where a model's residual stream runs: its blocks in order, what each is made of, and how to read h^(l) from them.

What is known about architectures is data, here and in `parts`, `readers` and `wrappers`. The list of blocks itself is
found by structure, so that a new architecture usually needs nothing. That each block takes what the one before it
returned is held against the first forward that is recorded (`chain`).
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch.nn import Module, ModuleDict, ModuleList, Sequential

from repflow.monitor.parts import block_kind, block_parts
from repflow.monitor.readers import Reader, block_reader
from repflow.monitor.wrappers import strip_wrappers

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

SIDES = frozenset(["encoder", "decoder"])
"""The two streams of a model that has both, by components of paths."""

OTHER_MODALITIES = frozenset(
    ["vision_tower", "vision_model", "vision_encoder", "visual", "audio_tower", "audio_model", "speech_encoder"]
)
"""Components of the paths of lists that hold no text: chosen only by `stream=` or `blocks=`."""


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

    @property
    def is_decoder(self) -> bool:
        """Whether the blocks are in a module called `decoder`."""
        return _side(self.blocks[0].name) == "decoder"


@dataclass(frozen=True)
class _Candidate:
    """A list that may be the list of blocks."""

    path: str
    items: list[tuple[str, Module]]

    @property
    def name(self) -> str:
        return strip_wrappers(self.path) or "model"

    @property
    def side(self) -> str | None:
        return _side(self.path)

    def is_stream(self, name: str) -> bool:
        """Whether this is what `stream=name` asks for."""
        if name in SIDES:
            return name in (self.name, self.side)
        return name == self.name or name in self.path.split(".")

    def __str__(self) -> str:
        return f"'{self.name}' ({len(self.items)} × {type(self.items[0][1]).__name__})"


def find_residual_stream(
    model: Module, blocks: str | Sequence[Module] | None = None, *, stream: str | None = None
) -> ResidualStream:
    """Find the blocks of `model`.

    Without `blocks`, they are the longest list of modules that is not itself inside such a list: a ModuleList, or a
    ModuleDict with numbers for keys; a Sequential where there is none of these.

    Args:
        model: any module, wrapped or not.
        blocks: dotted path of the list of blocks (`"transformer.h"`), or the blocks themselves in the order in which
            they run.
        stream: which one, in a model with several: `"encoder"`, `"decoder"`, or another component of the path.

    Raises:
        ValueError: no list of blocks, several that fit equally well, or a path that does not exist.
        TypeError: a model that is none, or `blocks` that are not modules.
    """
    if not isinstance(model, Module):
        raise TypeError(
            f"`find_residual_stream`: expected a model that is a torch.nn.Module, got {type(model).__name__}; "
            "load or build it first, and pass what is trained"
        )
    if isinstance(blocks, str):
        chosen = _named_candidate(model, blocks)
    elif blocks is not None:
        chosen = _given_candidate(model, blocks)
    else:
        chosen = _choose(model, list(_candidates(model)), stream)
    ancestors = tuple(model.get_submodule(path) for path in _prefixes(chosen.path))
    owner = next((module for module in reversed(ancestors) if not _is_list(module)), model)
    norms = (getattr(owner, name, None) for name in FINAL_NORMS)
    return ResidualStream(
        name=stream or chosen.name,
        blocks=tuple(_block(index, path, module) for index, (path, module) in enumerate(chosen.items)),
        ancestors=ancestors,
        final_norm=next((norm for norm in norms if isinstance(norm, Module)), None),
    )


def list_names(model: Module) -> dict[str, str]:
    """Every list in `model` that could be a list of blocks: its dotted path, and how it is told in words."""
    return {candidate.name: str(candidate) for candidate in _candidates(model)}


def _block(index: int, path: str, module: Module) -> Block:
    parts = block_parts(module)
    return Block(index, strip_wrappers(path), block_kind(parts), module, parts, block_reader(module))


def _candidates(model: Module) -> Iterator[_Candidate]:
    """Outermost lists of modules that have parameters: ModuleLists and their kin; in their absence, Sequentials."""
    for is_list in (_is_list, lambda module: isinstance(module, Sequential)):
        found: list[_Candidate] = []
        for path, module in model.named_modules():
            if not is_list(module) or any(path.startswith(f"{other.path}.") for other in found if other.path):
                continue
            items = _items(path, module)
            if isinstance(module, Sequential):
                items = _blocks_of_sequential(items)
            if items and all(_is_block(item) for _, item in items):
                found.append(_Candidate(path, items))
        if found:
            yield from found
            return


def _side(path: str) -> str | None:
    """`encoder` or `decoder`, whichever comes first in a path: a decoder may be made of an `encoder` too."""
    return next((part for part in path.split(".") if part in SIDES), None)


def _items(path: str, module: Module) -> list[tuple[str, Module]]:
    """Path and module of every item, with those that are in the list more than once."""
    items = module._modules.items()
    return [(f"{path}.{name}" if path else name, item) for name, item in items if item is not None]


def _blocks_of_sequential(items: list[tuple[str, Module]]) -> list[tuple[str, Module]]:
    """Without the bare layers at both ends: in a model that is one Sequential, they are embedding, norm and head."""
    structured = [place for place, (_, item) in enumerate(items) if _has_structure(item)]
    return items[structured[0] : structured[-1] + 1] if structured else items


def _has_structure(module: Module) -> bool:
    return next(module.children(), None) is not None


def _is_list(module: Module) -> bool:
    return isinstance(module, ModuleList) or (
        isinstance(module, ModuleDict) and all(name.isdecimal() for name in module)
    )


def _is_block(module: Module) -> bool:
    return not _is_list(module) and next(module.parameters(), None) is not None


def _choose(model: Module, candidates: list[_Candidate], stream: str | None) -> _Candidate:
    kind = type(model).__name__
    if not candidates:
        raise ValueError(
            f"`find_residual_stream`: expected a list of blocks in {kind}, found no ModuleList of modules with "
            'parameters; pass blocks="dotted.path" or blocks=[module, ...] in the order in which they run'
        )
    listing = ", ".join(map(str, candidates))
    if stream is not None:
        candidates = [c for c in candidates if c.is_stream(stream)]
        if not candidates:
            raise ValueError(f"`find_residual_stream`: no stream {stream!r} in {kind}; it has {listing}")
    else:
        candidates = [c for c in candidates if OTHER_MODALITIES.isdisjoint(c.path.split("."))] or candidates
        if {"encoder", "decoder"} <= {c.side for c in candidates}:
            raise ValueError(
                f'`find_residual_stream`: {kind} has two streams; pass stream="encoder" or stream="decoder". '
                f"It has {listing}"
            )
    # Lists of bare layers (heads, embeddings) only count where there is nothing with an inner structure.
    structured = [c for c in candidates if all(_has_structure(item) for _, item in c.items)]
    candidates = structured or candidates
    longest = max(len(c.items) for c in candidates)
    best = [c for c in candidates if len(c.items) == longest]
    if len(best) > 1:
        raise ValueError(
            f"`find_residual_stream`: {kind} has several lists of {longest} blocks: {', '.join(map(str, best))}; "
            + _remedy(model, best)
        )
    return best[0]


def _remedy(model: Module, alike: list[_Candidate]) -> str:
    parents = {candidate.path.rpartition(".")[0] for candidate in alike}
    if len(parents) == 1 and _is_list(model.get_submodule(*parents)):
        return (
            f"they are the parts of blocks in '{strip_wrappers(*parents)}', which are lists and not called: "
            "make each block a module whose forward returns the stream"
        )
    return f'pass the right one, for example blocks="{alike[0].name}"'


def _named_candidate(model: Module, path: str) -> _Candidate:
    by_name = {strip_wrappers(name): (name, module) for name, module in model.named_modules()}
    if path not in by_name:
        near = ", ".join(map(repr, difflib.get_close_matches(path, by_name, n=3, cutoff=0.3)))
        raise ValueError(
            f"`find_residual_stream`: no module {path!r} in {type(model).__name__}; nearest: {near or 'none'}"
        )
    full, module = by_name[path]
    items = _items(full, module)
    if not (_is_list(module) or isinstance(module, Sequential)) or not items:
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
