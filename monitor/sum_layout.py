"""The sums that one monitored step leaves, in one flat vector, and what is divided out of them.

Everything that repflow reports is a ratio of sums over tokens or over groups (sequences, or documents of packed rows).
The sums of one step live in a single flat float64 vector, so that they are copied from the device in one piece, added
up over micro-batches, ranks or steps by plain addition, and stored in the run file as they are.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from repflow.monitor.functional.cka import cka_from_hsic
from repflow.monitor.functional.ssm import RATE_BINS, ssm_values

POSITION_BINS = 64


@dataclass(frozen=True)
class SumLayout:
    """Where each sum of a step lies in the flat vector, for a stream of `num_states` states (S = L + 1).

    `ssm_blocks` are the indices of the M blocks whose decay rates are counted; `probe` says that the states are those
    of a probe batch, which are compared with what they were. All entries are sums, except the last
    ones, named in `MAXIMA`, which are merged by maximum.
    """

    num_states: int
    ssm_blocks: tuple[int, ...] = ()
    probe: bool = False

    MAXIMA: ClassVar[tuple[str, ...]] = ("fourth_moment_max", "mask_max", "document_max", "documents_left_out")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every sum, in the order of the flat vector."""
        states = self.num_states
        transitions, interior, ssm = states - 1, max(states - 2, 0), len(self.ssm_blocks)
        drift = states if self.probe else 0
        return {
            "tokens": (),  # valid tokens measured
            "sequences": (),  # groups with at least one valid token
            "short_sequences": (),  # groups with too few tokens for inter-token similarity (fewer than 2)
            "inter_token": (states,),  # Σ over groups of the similarity of h^(l)
            "inter_token_groups": (states,),
            "update_inter_token": (transitions,),  # the same of Δh^(l)
            "update_inter_token_groups": (transitions,),
            "adjacent": (transitions,),  # Σ over tokens of cos(h^(l), h^(l+1))
            "adjacent_tokens": (transitions, POSITION_BINS),  # the same by relative position in the sequence
            "adjacent_tokens_count": (transitions, POSITION_BINS),
            "adjacent_count": (transitions,),
            "norms": (states,),  # Σ over tokens of ‖h^(l)‖₂
            "norms_count": (states,),
            "local_variance": (interior,),  # Σ over tokens of the feature mean of |second difference|
            "local_variance_count": (interior,),
            "global_variance": (),  # Σ over tokens of the feature mean of the std over states
            "global_variance_count": (),
            "local_variance_relative": (),  # Σ over tokens of the token's local variance / its RMS
            "global_variance_relative": (),
            "relative_count": (),
            "hsic": (states, states),  # Σ over groups of HSIC(a, b)
            "hsic_groups": (),
            "hsic_short_groups": (),  # groups with too few tokens for the estimator
            "fourth_moment": (states,),  # Σ over the tokens of CKA of ‖x_c‖⁴
            "nonfinite": (states,),  # valid tokens with a NaN or an infinity
            "zero": (states,),  # valid tokens that are the zero vector
            "ssm_decay_bins": (ssm, RATE_BINS),  # tokens by −ln ρ_t
            "ssm_memory_bins": (ssm, RATE_BINS),  # tokens × channels by 1/τ
            "ssm_nonfinite": (ssm,),  # valid tokens with a Δ that is a NaN or an infinity
            "drift_hsic": (drift, 3, 3),  # Σ over groups of HSIC of h^(l) now, at first and the time before
            "fourth_moment_max": (states,),  # the largest ‖x_c‖⁴ of one token
            "mask_max": (),  # the largest value of a mask that was read as padding only
            "document_max": (),  # the largest value of a mask that was looked through for documents
            # documents of (rows of) a micro-batch for which there was no room, or sequences not measured whole
            "documents_left_out": (),
        }

    @cached_property
    def _sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes.values()]

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self._sizes)

    @cached_property
    def num_sums(self) -> int:
        """How many of them are sums; the maxima follow."""
        return self.size - sum(prod(self.shapes[name]) for name in self.MAXIMA)

    def zeros(self, device: torch.device | str = "cpu") -> Float64[Tensor, " size"]:
        """An empty vector of sums."""
        return torch.zeros(self.size, dtype=torch.float64, device=device)

    def views(self, flat: Float64[Tensor, "*batch size"]) -> dict[str, Tensor]:
        """The named sums as views into `flat`: writing to one writes to the vector."""
        if flat.shape[-1:] != (self.size,):
            raise ValueError(
                f"`SumLayout.views`: expected vectors of {self.size} sums for {self.num_states} states, "
                f"got shape {tuple(flat.shape)}"
            )
        parts = flat.split(self._sizes, -1)
        return {
            name: part.squeeze(-1) if not shape else part if len(shape) == 1 else part.unflatten(-1, shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def values(self, flat: Float64[Tensor, "*batch size"]) -> dict[str, Tensor]:
        """Everything that is divided out of the sums, under the names and in the shapes of `Snapshot`."""
        part = self.views(flat)
        values = {
            "tokens": part["tokens"].long(),
            "sequences": part["sequences"].long(),
            "inter_token": _ratio(part["inter_token"], part["inter_token_groups"]),
            "update_inter_token": _ratio(part["update_inter_token"], part["update_inter_token_groups"]),
            "adjacent": _ratio(part["adjacent"], part["adjacent_count"]),
            "norms": _ratio(part["norms"], part["norms_count"]),
            "v_loc": _ratio(part["local_variance"].sum(-1), part["local_variance_count"].sum(-1)),
            "v_glob": _ratio(part["global_variance"], part["global_variance_count"]),
            "local_variance": _ratio(part["local_variance"], part["local_variance_count"]),
            "v_loc_rel": _ratio(part["local_variance_relative"], part["relative_count"] * (self.num_states > 2)),
            "v_glob_rel": _ratio(part["global_variance_relative"], part["relative_count"]),
            "cka": cka_from_hsic(part["hsic"]),
            "hsic_top_token": _ratio(part["fourth_moment_max"], part["fourth_moment"]),
            "adjacent_tokens": _ratio(part["adjacent_tokens"], part["adjacent_tokens_count"]),
            "nonfinite": part["nonfinite"].long(),
            "zero": part["zero"].long(),
        }
        if self.ssm_blocks:
            values |= ssm_values(part, self.ssm_blocks, self.num_states - 1)
        if self.probe:
            drift = cka_from_hsic(part["drift_hsic"])[..., 0, :]
            values |= {"drift_first": drift[..., 1], "drift_previous": drift[..., 2]}
        return values

    def merge_(self, into: Float64[Tensor, " size"], other: Float64[Tensor, " size"]) -> None:
        """Add the sums of `other` to `into`, in place."""
        start = self.num_sums
        into[:start] += other[:start]
        torch.maximum(into[start:], other[start:], out=into[start:])


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """`total / count`, NaN where nothing was counted."""
    return torch.where(count > 0, total / count, torch.nan)
