"""Whether each block takes what the one before it returned: held against the first forward that is recorded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from repflow.monitor.residual_stream import ResidualStream


@dataclass(frozen=True)
class _Link:
    """What the last block that returned has returned."""

    index: int
    state: Tensor
    version: int
    """Of the state at that time: changing it in place counts it up."""


class Chain:
    """Follows one forward from block to block, until a whole one has held.

    It compares addresses. Only where these differ, as after a cast, a move to another device, or a sum that each side
    computes by itself, does it compare values, which waits for the device.
    """

    def __init__(self, stream: ResidualStream) -> None:
        self._stream = stream
        self._last: _Link | None = None
        self.verified = False
        """A forward has passed from the first block through the last."""

    def begin(self, state: Tensor) -> None:
        """A forward begins with h^(0) = `state`.

        Raises:
            ValueError: it is what the last block returned: the blocks run several times in one forward.
        """
        if self._is_whole() and self._follows(state):
            first, last = self._stream.blocks[0].name, self._stream.blocks[-1].name
            raise ValueError(
                f"expected '{first}' to begin a forward, and it took what '{last}' had returned: these blocks run "
                "several times in one forward; pass blocks=[...] in the order in which they run, as often as they do"
            )
        self.end()

    def left(self, index: int, state: Tensor) -> None:
        """Block `index` has returned `state`."""
        self._last = _Link(index, state, _version(state))

    def broken(self, index: int, state: Tensor) -> str | None:
        """What is wrong if block `index` takes `state`; None if it is what the block before it returned."""
        if self._follows(state):
            return None
        assert self._last is not None
        returned, taken = _describe(self._last.state), _describe(state)
        got = taken if taken != returned else f"other values in {taken}"
        before, after = (self._stream.blocks[i].name for i in (index - 1, index))
        return f"'{after}' did not take what '{before}' returned: expected that {returned}, got {got}"

    def end(self) -> None:
        """Nothing more comes of the forward: forget its last state."""
        self.verified = self.verified or self._is_whole()
        self._last = None

    def _is_whole(self) -> bool:
        return self._last is not None and self._last.index == len(self._stream) - 1

    def _follows(self, state: Tensor) -> bool:
        last = self._last
        if last is None or last.state.shape != state.shape:
            return False
        if _address(last.state) == _address(state):
            return _version(state) == last.version
        wanted = last.state.detach().to(state.device, state.dtype)
        return bool(torch.isclose(wanted, state.detach(), rtol=0, atol=0, equal_nan=True).all())


def _address(state: Tensor) -> tuple[object, ...]:
    return state.device, state.dtype, state.data_ptr(), state.stride()


def _version(state: Tensor) -> int:
    return 0 if state.is_inference() else state._version


def _describe(state: Tensor) -> str:
    return f"{str(state.dtype).removeprefix('torch.')} {list(state.shape)}"
