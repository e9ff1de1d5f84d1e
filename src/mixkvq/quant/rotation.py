"""Hadamard rotation: spreads a vector's large entries over all of them before it is quantized."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal, symmetric Hadamard matrix ``[size, size]`` in float32.

    Sylvester's construction. Where ``size`` is not a power of two, the matrix is block diagonal with blocks of the
    largest power of two that divides it (96 = 3 blocks of 32). It is its own inverse.
    """
    if size < 1:
        raise ValueError(f"A rotation needs a positive size, not {size}.")
    block = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    matrix = matrix / block**0.5
    return torch.block_diag(*[matrix] * (size // block)).to(device)


def rotate(x: Tensor) -> Tensor:
    """Rotate the last dimension, in float32. Applying it twice gives ``x`` back, up to rounding."""
    return x.float() @ hadamard(x.shape[-1], x.device)
