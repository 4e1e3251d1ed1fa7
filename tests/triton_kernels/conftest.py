"""A quicker interpreter."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def patch_once_per_launch() -> Iterator[None]:
    """Triton's interpreter patches the language anew at every `tl.sum` of every program: a third of its time.

    Once per launch and module is enough, since it takes nothing back before the end of the launch.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch(fn)

    def launch(self: Any, *args: Any, **options: Any) -> None:
        patched.clear()
        call(self, *args, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield
