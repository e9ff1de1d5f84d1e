"""Codes <-> bit planes: the unit of storage.

A code of ``b`` bits is cut into planes of 2 bits, and one of 1 bit if ``b`` is odd, the most significant first.
A plane is stored in 16-bit words along the tokens of a page of ``R`` tokens: with planes of ``w`` bits a word holds
``n = 16 / w`` codes and there are ``R / n`` words; bits ``w*i .. w*i + w - 1`` of word ``t`` belong to token
``t + i * R / n``. So position ``i`` of all words is one tile of neighbouring tokens, and no unpacked code has to
move (docs/format.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 16


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes that hold a code of ``bits`` bits, the most significant plane first.

    >>> plane_widths(4), plane_widths(3), plane_widths(1)
    ((2, 2), (2, 1), (1,))
    """
    return (2,) * (bits // 2) + (1,) * (bits % 2)


def words_per_page(tokens: int, width: int) -> int:
    """Words that a plane of ``width`` bits needs for ``tokens`` codes."""
    return tokens * width // WORD_BITS


def split_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """Cut codes of ``bits`` bits (uint8, any shape) into one uint8 tensor per plane, most significant first."""
    planes, remaining = [], bits
    for width in plane_widths(bits):
        remaining -= width
        planes.append((codes >> remaining) & ((1 << width) - 1))
    return planes


def join_planes(planes: list[Tensor], bits: int) -> Tensor:
    """The inverse of :func:`split_planes`; the result has the type of the planes."""
    widths = plane_widths(bits)
    if len(planes) != len(widths):
        raise ValueError(f"{bits} bits take {len(widths)} planes, {len(planes)} were given.")
    codes = planes[0]
    for plane, width in zip(planes[1:], widths[1:], strict=True):
        codes = (codes << width) | plane
    return codes


def pack(plane: Tensor, width: int, dim: int) -> Tensor:
    """Pack a plane's codes into words along the token dimension.

    Args:
        plane: uint8 codes below ``2**width``, ``R`` of them along ``dim``.
        width: 1 or 2.
        dim: the token dimension, negative.

    Returns:
        int16, with ``R * width / 16`` words along ``dim``.
    """
    per_word = WORD_BITS // width
    tokens = plane.shape[dim]
    if tokens % per_word:
        raise ValueError(f"{tokens} codes of {width} bits do not fill whole words of {per_word}.")
    tiles = plane.to(torch.int32).unflatten(dim, (per_word, tokens // per_word))
    words = torch.zeros_like(tiles.select(dim - 1, 0))
    for i in range(per_word):
        words |= tiles.select(dim - 1, i) << (width * i)
    # Bit 15 is the sign of an int16: bring the value into range rather than rely on how a cast wraps.
    return (words - ((words & 0x8000) << 1)).to(torch.int16)


def unpack(words: Tensor, width: int, dim: int) -> Tensor:
    """The inverse of :func:`pack`: int16 words to int16 codes along ``dim`` (negative)."""
    mask = (1 << width) - 1
    if words.shape[-1] % 2 == 0 and words.stride(-1) == 1:
        # Two neighbouring words at once: half the elements, and shifts of 32 bits are the faster ones.
        words, mask = words.view(torch.int32), mask << WORD_BITS | mask
    shifts = torch.arange(0, WORD_BITS, width, dtype=words.dtype, device=words.device)
    tiles = words.unsqueeze(dim - 1) >> shifts.view(-1, *[1] * -dim)
    return tiles.bitwise_and_(mask).view(torch.int16).flatten(dim - 1, dim)
