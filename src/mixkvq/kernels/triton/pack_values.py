"""Device functions that rotate, quantize and pack the values of one head of one block."""

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.kernels.triton.affine import cast, quantize
from mixkvq.kernels.triton.planes import field, words


@triton.jit
def pack_values(source, stride: tl.constexpr, signs, head, page, side: tl.constexpr, form: tl.constexpr):
    """Values ``[R, D]`` at ``source`` into a page, a tile of tokens of one group of channels after the other.

    A tile holds whole words: the tokens ``first .. first + words - 1`` of each of 16 equal parts of the block.

    Args:
        signs: pointer to the rotation's signs ``[D, D]``, in the type that it multiplies in; any if it does not rotate.
        page: pointer to the page's record.
    """
    part: tl.constexpr = form.tokens // 16
    row = tl.arange(0, 16 * form.words)
    for group in range(side.groups):
        column = tl.arange(0, side.tile)
        inside = (column < side.group)[None, :]
        channel = group * side.group + column
        for first in range(0, part, form.words):
            token = row // form.words * part + first + row % form.words
            if form.rotated:
                x = rotate(source + token[:, None] * stride, signs, channel, inside, side, form)
            else:
                x = tl.load(source + token[:, None] * stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            if side.dense:
                place = field(page, side.copy, form.dense_dtype) + (head * form.tokens + token) * side.dim
                tl.store(place[:, None] + channel[None, :], cast(x, form.dense_dtype), mask=inside)
            else:
                pack_tile(x, token, group, channel, inside, first, head, page, side, form)


@triton.jit
def rotate(source, signs, channel, inside, side: tl.constexpr, form: tl.constexpr):
    """The given channels of the rotated values. Signs are exact in any type, so that nothing is lost in the product."""
    inner = tl.arange(0, form.rotation_dim)
    matrix = tl.load(
        signs + inner[:, None] * side.dim + channel[None, :],
        mask=(inner < side.dim)[:, None] & inside,
        other=0.0,
    )
    x = tl.load(source + inner[None, :], mask=(inner < side.dim)[None, :], other=0.0).to(matrix.dtype)
    return tl.dot(x, matrix, input_precision="tf32x3") * form.rotation


@triton.jit
def pack_tile(x, token, group, channel, inside, first, head, page, side: tl.constexpr, form: tl.constexpr):
    """Planes, scales and zeros of a tile ``[T, C]``."""
    masked: tl.constexpr = side.tile != side.group
    levels = tl.full([1, 1], (1 << side.bits) - 1, tl.float32)
    codes, scale, zero = quantize(x, levels, inside, 1, masked, side, form)

    place = ((head * side.groups + group) * form.tokens + token)[:, None]
    tl.store(field(page, side.scale, form.params.dtype) + place, scale.to(form.params.dtype))
    if not side.symmetric:
        tl.store(field(page, side.zero, form.params.dtype) + place, zero.to(form.params.dtype))

    part: tl.constexpr = form.tokens // 16
    for i in tl.static_range(len(side.planes.offsets)):
        plane = words(tl.trans(codes), side.planes.widths[i], side.planes.shifts[i])
        row = tl.arange(0, plane.shape[1])
        word = (row // form.words * part + first + row % form.words)[None, :]
        count = part * side.planes.widths[i]
        place = (head * side.dim + channel)[:, None] * count + word
        tl.store(field(page, side.planes.offsets[i], tl.int16) + place, plane, mask=tl.trans(inside))
