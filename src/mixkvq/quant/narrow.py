"""Half as many bits for codes that are stored already, by integers alone.

``2^2n - 1 = (2^n - 1)(2^n + 1)``: every ``2^n + 1``-th code of ``2n`` bits is a code of ``n`` bits, lowest and highest
among them. So the zero stays, the scale grows by ``2^n + 1``, and codes are rounded to the nearest one kept (PM-KVQ,
arXiv 2505.18610, section 3.2). Codes have the grid that quantizing the numbers themselves at ``n`` bits would have
given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.quant.affine import storable


def narrow_scale(scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The scale in float32 that goes with codes of ``bits`` bits, an even number, once they are halved."""
    return storable(scale.float() * _step(bits), dtype)


def narrow_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits (any integer type and shape) as codes of half as many, in the same type.

    >>> import torch
    >>> narrow_codes(torch.tensor([0, 2, 3, 5, 12, 15]), 4)
    tensor([0, 0, 1, 1, 2, 3])
    """
    step = _step(bits)
    # The step is odd, so that no code lies halfway between two.
    return ((codes.int() + step // 2) // step).to(codes.dtype)


def _step(bits: int) -> int:
    return (1 << bits // 2) + 1
