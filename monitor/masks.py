"""Which tokens are padding, and which belong together: read from the arguments that models are called with."""

import inspect
import itertools
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor
from torch.nn import Module


def _of_floats(mask: Tensor) -> Tensor:
    """1 at tokens and 0 at padding; or what Longformer adds to scores: 0 or much more at tokens, less at padding."""
    added = (mask < 0).any() | (mask > 1).any() | ~(mask > 0).any()
    return torch.where(added, mask >= 0, mask > 0)


PADDING_ARGUMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mask": lambda mask: _of_floats(mask) if mask.is_floating_point() else mask,
    # Of torch.nn.TransformerEncoder and TransformerDecoder, where what is not 0 is padding:
    "src_key_padding_mask": lambda mask: mask == 0,
    "tgt_key_padding_mask": lambda mask: mask == 0,
}
"""Names under which models take a mask `[B, T]`, and how to turn it into one where 0 is padding."""


SEGMENT_ARGUMENTS = ("seq_idx",)
"""Names under which models take the number of each token's document `[B, T]`, from 0; less is padding."""

TARGETS, NO_TARGET = "labels", -100
"""Under which models of encoder and decoder take what the decoder is to predict, and what stands at padding there."""

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""Names under which models take what they know of earlier tokens, which a mask then covers, too."""

OTHER_MASKS = (
    *("mask_time_indices", "mask_feature_indices", "bool_masked_pos", "loss_mask"),
    *("decoder_attention_mask", "encoder_attention_mask", "memory_mask", "memory_key_padding_mask"),
    *("head_mask", "decoder_head_mask", "cross_attn_head_mask"),
)
"""Names of masks that say something else: what is predicted, the padding of another stream, which heads are used."""

BOUNDARY_ARGUMENTS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens", "cu_seq_lens")
"""Names under which models take where each document of a single packed row begins, and the last one ends."""


class CallMasks(NamedTuple):
    """What one call of a module says about its tokens."""

    padding: Shaped[Tensor, "B T"] | None = None
    """0 at padding."""
    position_ids: Int[Tensor, "B T"] | None = None
    """Positions, which start again with each document of a packed row."""
    segments: Int[Tensor, "B T"] | None = None
    """Number of the document, from 0."""
    boundaries: Int[Tensor, " N1"] | None = None
    """Where each of N documents of the only row begins, and the last one ends."""
    targets: Int[Tensor, "B T"] | None = None
    """What a decoder is to predict: behind the last one of a row that is not `NO_TARGET` there is padding."""
    cached: bool = False
    """Whether `padding` begins with tokens in front of those of the call, of which it was given a cache."""

    def of_flat_tokens(self) -> "CallMasks":
        """The same of states without a dimension for rows."""
        rows = (None if mask is None else mask.reshape(1, -1) for mask in self[:3])
        return CallMasks(*rows, boundaries=self.boundaries, cached=self.cached)  # no encoder-decoder: no `targets`


class ToldMasks(NamedTuple):
    """What one call tells by itself: a mask may be told to be None."""

    masks: CallMasks
    tells: tuple[bool, ...]
    """Which of them the call tells."""
    others: Callable[[], Mapping[str, Tensor]] = dict
    """Gives, by name, tensors among its arguments that may be masks, under names that are not known."""

    def within(self, outer: CallMasks) -> CallMasks:
        """The masks of the call, where `outer` are those of the call around it."""
        pairs = zip(self.tells, self.masks, outer, strict=True)
        nearest: list[Any] = [own if told else around for told, own, around in pairs]
        return CallMasks(*nearest)


_KNOWN = frozenset([*PADDING_ARGUMENTS, *SEGMENT_ARGUMENTS, *BOUNDARY_ARGUMENTS, "position_ids"])


def _may_be_mask(name: str, value: object) -> bool:
    """Whether an argument is of booleans, or called a mask or padding, and is not known as another mask."""
    named = isinstance(value, Tensor) and (value.dtype == torch.bool or "mask" in name or "pad" in name)
    return named and name not in OTHER_MASKS


@lru_cache(maxsize=64)
def _arguments(forward: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a class's `forward`: they take a while to find, and each sampled step asks."""
    return _names(forward)[1:]


def _names(forward: Callable[..., Any]) -> list[str]:
    """Names of arguments; those that stand for any number of them begin with a star."""
    parameters = inspect.signature(forward).parameters.values()
    return [f"*{p.name}" if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) else p.name for p in parameters]


@no_type_check  # compilers trace it
class MaskReader:
    """Reads the masks of the calls of `module`.

    A call of a module further in says more than one further out, for it is nearer to the blocks: a decoder that is
    called without a mask has none, whatever its encoder's is. Where it does not tell, because the module takes no such
    argument or was given it in another form (already widened to 4-D, say), what was found further out holds.

    Args:
        module: whose calls are read.
        decoder: whether the blocks are those of a decoder beside an encoder, of which `labels` then tell the padding:
            models shift them to the right for its input, and pass it no mask of its own.
    """

    def __init__(self, module: Module, *, decoder: bool = False) -> None:
        if "forward" in module.__dict__:  # put over that of the class, as accelerate does
            self._parameters = _names(module.forward)
        else:
            self._parameters = _arguments(type(module).forward)
        self._targets = (TARGETS,) if decoder and "decoder_input_ids" in self._parameters else ()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, boundaries: bool = True) -> ToldMasks:
        """What a call tells. A compiler traces this, without `boundaries`.

        Their number differs from batch to batch, and a graph would be compiled anew for each that as much as looks at
        their shape.
        """
        padding, tells_padding = None, False
        for name, convert in PADDING_ARGUMENTS.items():
            tells_padding, value = self._argument(name, args, kwargs)
            if tells_padding:
                padding = None if value is None else convert(value)
                break
        tells_positions, ids = self._argument("position_ids", args, kwargs)
        tells_segments, segments = self._first(SEGMENT_ARGUMENTS, args, kwargs)
        tells_boundaries, ends = self._first(BOUNDARY_ARGUMENTS, args, kwargs, 1) if boundaries else (False, None)
        # None tells nothing here: a model that is called without labels, inside of one that computes the loss.
        _, targets = self._first(self._targets, args, kwargs)
        cached = any(self._value(name, args, kwargs) is not None for name in CACHE_ARGUMENTS)
        told = CallMasks(padding, ids, segments, ends, targets, cached)
        tells = (tells_padding, tells_positions, tells_segments, tells_boundaries, targets is not None, tells_padding)
        return ToldMasks(told, tells)

    def others(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Arguments that may be masks of padding, and that nothing else here reads."""
        named = list(itertools.takewhile(lambda name: name[0] != "*", self._parameters))
        names = (*named, *(f"argument {place}" for place in range(len(named), len(args))))
        given = dict(zip(names, args, strict=False)) | kwargs
        return {name: value for name, value in given.items() if name not in _KNOWN and _may_be_mask(name, value)}

    def makes_decoder_input(self) -> bool:
        """Whether the input of the decoder is among the module's arguments, or made of `labels`."""
        return bool(self._targets)

    def takes_mask(self) -> bool:
        """Whether the module's forward names a mask."""
        return any(name in self._parameters for name in PADDING_ARGUMENTS)

    def _first(
        self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int = 2
    ) -> tuple[bool, Tensor | None]:
        """The first of several arguments that the call tells."""
        for name in names:
            tells, value = self._argument(name, args, kwargs, ndim)
            if tells:
                return tells, value
        return False, None

    def _argument(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int = 2
    ) -> tuple[bool, Tensor | None]:
        """Whether the call tells the argument, and its value."""
        value = self._value(name, args, kwargs)
        if isinstance(value, Tensor) and value.ndim == ndim:
            return True, value
        return value is None and name in self._parameters, None

    def _value(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self._parameters.index(name) if name in self._parameters else len(args)
        return kwargs.get(name, args[position] if position < len(args) else None)


def token_groups(
    masks: CallMasks, rows: int, tokens: int, *, exact: bool = False
) -> Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None:
    """One mask `[rows, tokens]` of what a call said: 0 is padding, k is document k of its row; None, no padding.

    Where documents are told in several ways, another begins wherever one of them says so. `exact`: see `fit_mask`.

    Raises:
        ValueError: a mask of another shape.
    """
    padding = None if not exact and misfit(masks, tokens) else fit_mask(masks.padding, rows, tokens, exact=exact)
    if padding is None and (targets := _fitting(masks.targets, rows, tokens)) is not None:
        padding = (targets != NO_TARGET).flip(1).cumsum(1).flip(1) > 0
    ids, segments = (_fitting(values, rows, tokens) for values in (masks.position_ids, masks.segments))
    if masks.boundaries is not None and rows == 1:
        segments = _between(masks.boundaries, tokens)
    told = segments if segments is not None else ids
    if told is None:
        return padding
    valid = torch.ones_like(told, dtype=torch.bool) if padding is None else (padding != 0).to(told.device)
    if segments is not None:
        valid = valid & (segments >= 0)
    numbered = padding is not None and padding.dtype != torch.bool
    return _documents(valid, ids, [segments, padding if numbered else None])


def misfit(masks: CallMasks, tokens: int) -> str | None:
    """A mask of more tokens than there are states of, without a cache, in words: it cannot be said which are meant.

    Such is that of an encoder that makes one state of several samples of sound.
    """
    mask = masks.padding
    if mask is None or masks.cached or mask.ndim != 2 or mask.shape[1] <= tokens:
        return None
    return f"a mask {list(mask.shape)}, which does not fit {tokens} states,"


def unread_mask(others: Mapping[str, Tensor], rows: int, tokens: int) -> str | None:
    """What may be a mask of states `[rows, tokens]`, in words: of their shape, or with ones between; else None.

    `[T, T]` is not: it says which token sees which.
    """
    for name, value in others.items():
        shape = list(value.shape)
        fits = [*shape[:1], *shape[-1:]] == [rows, tokens] and value.numel() == rows * tokens
        if fits and (len(shape) > 2 or rows != tokens):
            return f"{name!r}, {str(value.dtype).removeprefix('torch.')} {shape},"
    return None


def _fitting(values: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """`values [rows, tokens]`, also where one row stands for all; None where they are of another shape."""
    if values is None or values.shape[0] not in (1, rows) or values.shape[1] != tokens:
        return None
    return values.expand(rows, tokens)


def _between(boundaries: Int[Tensor, " N1"], tokens: int) -> Int64[Tensor, "1 T"]:
    """The document of each token of a row, from 0; −1 before the first and behind the last."""
    place = torch.arange(tokens, device=boundaries.device)
    number = torch.searchsorted(boundaries.contiguous(), place, right=True) - 1
    return torch.where(number < len(boundaries) - 1, number, -1).unsqueeze(0)


def fit_mask(mask: Tensor | None, rows: int, tokens: int, *, exact: bool = False) -> Tensor | None:
    """A mask of the states' shape `[rows, tokens]`, from what models and users call a mask.

    `exact`: it was made for these states, and has no tokens in front of them.

    Raises:
        ValueError: it is something else.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.shape == (rows, tokens)):
        return mask
    if not exact and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == rows and mask.shape[1] > tokens:
        return mask[:, -tokens:]  # covers cached or virtual tokens in front
    if not exact and isinstance(mask, Tensor) and mask.shape == (tokens, tokens):
        return None  # which token sees which: says nothing about padding
    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"expected a mask of shape {[rows, tokens]} like the states, got {got}; "
        "pass the right one: monitor.step(k, mask=...)"
    )


def _documents(
    valid: Bool[Tensor, "B T"], ids: Int[Tensor, "B T"] | None, labels: list[Int[Tensor, "B T"] | None]
) -> Int64[Tensor, "B T"]:
    """Document numbers from 1 up, 0 at padding: another begins where positions do not go on, or a label changes.

    Each token is held against the valid one before it, for padding may hold anything.
    """
    column = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, column, -1).cummax(1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    begins = before < 0
    place = before.clamp(min=0)
    if ids is not None:
        ids = ids.to(valid.device)
        begins = begins | (ids <= ids.gather(1, place))
    for label in labels:
        if label is not None:
            label = label.to(valid.device)
            begins = begins | (label != label.gather(1, place))
    return torch.where(valid, (begins & valid).cumsum(1), 0)
