"""How often Triton compiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that gets an entry, the kernel and the types of its arguments, whenever a kernel of repflow is compiled.

    Loading what an earlier process compiled counts too: it happens under the same conditions.
    """
    compiled: list[str] = []

    def note(*, repr: str, fn: Any, **_: Any) -> None:
        if fn.module.startswith("repflow"):
            compiled.append(repr)

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield compiled
    finally:
        knobs.runtime.jit_post_compile_hook = before
