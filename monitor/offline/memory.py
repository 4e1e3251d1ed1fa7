"""Running out of memory: how it shows, and what can be given back."""

import gc

import torch

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
