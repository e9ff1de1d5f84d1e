"""Device functions that write codes into the planes of a record (:mod:`mixkvq.quant.planes`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def field(record, offset: tl.constexpr, dtype: tl.constexpr):
    """Pointers to a field of one or several records."""
    return (record + offset).to(tl.pointer_type(dtype))


@triton.jit
def words(codes, width: tl.constexpr, shift: tl.constexpr):
    """One plane of a tile's codes ``[C, T]`` as int16 words ``[C, T * width / 16]``.

    A word holds ``n = 16 / width`` codes that lie ``T / n`` tokens apart.
    """
    count: tl.constexpr = 16 // width
    plane = (codes >> shift) & ((1 << width) - 1)
    tiles = tl.reshape(plane, [plane.shape[0], count, plane.shape[1] // count])
    places = tl.arange(0, count)[None, :, None] * width
    return tl.sum(tiles << places, axis=1).to(tl.int16)
