"""A quicker interpreter."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def quicker() -> Iterator[None]:
    """Triton's interpreter patches the language anew at every `tl.sum` of every program: a third of its time.

    Once per launch and module is enough, since it takes nothing back before the end of the launch. Which type of NumPy
    stands for one of Triton's, it finds in a dictionary that it makes for each question: a sixth of what is left.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    patch, call, numpy_type = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    numpy_scalar = cache(numpy_type)
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch(fn)

    def numpy_type_once(dtype: language.dtype) -> Any:
        # Types of pointers and blocks have no hash.
        return (numpy_scalar if type(dtype) is language.dtype else numpy_type)(dtype)

    def launch(self: Any, *args: Any, **options: Any) -> None:
        patched.clear()
        call(self, *args, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_type_once)
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield
