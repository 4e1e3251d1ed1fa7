"""Arithmetic of launch grids, on the host. Triton's own functions for it cost as much as a launch."""


def ceil_div(a: int, b: int) -> int:
    """⌈a/b⌉."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two from `n` ≥ 1 up."""
    return 1 << (n - 1).bit_length()


__all__ = ["ceil_div", "power_of_2"]
