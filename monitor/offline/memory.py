"""Running out of memory: how it shows, and what can be given back."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from repflow.monitor.offline import OfflineError

_TOLD = ("not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What plain RuntimeErrors say where the host has no more memory, or a library of CUDA."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is for want of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _TOLD)


def free_memory() -> None:
    """Give back what is no longer used. Call it outside of the `except`, which holds the frames that ran out."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Running out of memory, where nothing can be halved, becomes an OfflineError."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0]
        raise OfflineError(
            "out of memory: expected room for the model and one sequence; take a smaller dtype (--dtype bfloat16), "
            f"another --device, or several GPUs (--device-map auto). What is done is kept. ({first})"
        ) from error
