"""What DDP, FSDP, Fabric, torch.compile and activation checkpointing put around modules and into their names."""

from torch.nn import Module

WRAPPERS = frozenset(["module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
"""Components of module names that wrappers add."""

_HELD = tuple(sorted(WRAPPERS - {"module"}))  # `module` is also what users call their own


def strip_wrappers(path: str) -> str:
    """A dotted path without the components of `WRAPPERS`."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def unwrap(module: Module) -> Module:
    """The module itself, out of every wrapper around it."""
    while True:
        inner = next((held for held in map(module._modules.get, _HELD) if held is not None), None)
        if inner is None:
            return module
        module = inner
