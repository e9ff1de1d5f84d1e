"""The page format and the quantizer's settings as constants that kernels are compiled for.

Everything comes from :class:`~mixkvq.store.layout.PageLayout` and :mod:`mixkvq.quant.affine`; nothing is decided here
but the shape of the tiles that a program works on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from mixkvq.quant.affine import CLIP_FACTORS, GAINS, SYMMETRIC_FACTORS, is_clipped
from mixkvq.quant.block import DENSE_BITS
from mixkvq.quant.planes import WORD_BITS, plane_widths
from mixkvq.store.layout import PageLayout, Record

TRITON_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
}
#: Numbers that a program works on at once: 32 for each thread of four warps.
TILE = 4096
#: Numbers that are rotated at once: the product's operand lies in shared memory, and only one group of the result in
#: registers.
ROTATED = 8192
#: The shortest side of a matrix product's operands.
MIN_DOT = 16


@dataclass(frozen=True)
class Params:
    """The type of scales and zeros, with its limits as in :func:`torch.finfo`."""

    dtype: tl.dtype
    limit: float
    eps: float
    tiny: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Params:
        info = torch.finfo(dtype)
        return cls(TRITON_TYPES[dtype], info.max, info.eps, info.tiny)


@dataclass(frozen=True)
class Planes:
    """Bit planes in a record, most significant first: their offsets in bytes, their widths, and the bits below each."""

    offsets: tuple[int, ...]
    widths: tuple[int, ...]
    shifts: tuple[int, ...]

    @classmethod
    def of(cls, record: Record, name: str, bits: int) -> Planes:
        if bits == DENSE_BITS:
            return cls((), (), ())
        widths = plane_widths(bits)
        offsets = tuple(record.offsets[f"{name}_{i}"] for i in range(len(widths)))
        return cls(offsets, widths, tuple(sum(widths[i + 1 :]) for i in range(len(widths))))


@dataclass(frozen=True)
class Side:
    """How the keys or the values of a page are quantized and where they lie.

    Attributes:
        dim: channels of a head.
        bits: base width; ``dense`` where it stands for "not quantized".
        group: numbers that share a scale: tokens of a key channel, channels of a value.
        groups: of them in a channel or a token.
        copy, scale, zero: offsets in bytes of dense keys or values, scales and zeros; 0 where the page has none.
        factors: clipping factors that are tried after 1; empty without the search.
        gains: bounds of the unbiased stretch; empty without it.
        symmetric: no zeros are stored, and factors are about 0.
        tile: channels that are worked on at once.
    """

    dim: int
    bits: int
    dense: bool
    group: int
    groups: int
    planes: Planes
    copy: int
    scale: int
    zero: int
    factors: tuple[float, ...]
    gains: tuple[float, ...]
    symmetric: bool
    tile: int


@dataclass(frozen=True)
class Tier:
    """A promoted width: its chunk record, and the page's index of it."""

    bits: int
    dense: bool
    extra: int
    lanes: int
    nbytes: int
    channel: int
    channel_dtype: tl.dtype
    planes: Planes
    keys: int
    run: int
    first_lane: int


@dataclass(frozen=True)
class PageFormat:
    """Everything that packing a page needs to know when it is compiled."""

    heads: int
    tokens: int
    nbytes: int
    keys: Side
    values: Side
    tiers: tuple[Tier, ...]
    key_dim: int
    channels: int
    params: Params
    dense_dtype: tl.dtype
    promoted_dtype: tl.dtype
    words: int
    rotated: bool
    rotation: float
    rotation_dim: int


@lru_cache(maxsize=64)
def page_format(
    layout: PageLayout, *, key_clip: bool, key_unbiased: bool, value_clip: bool, value_unbiased: bool, rotated: bool
) -> PageFormat:
    """The constants of a layout; ``rotated`` and the four switches as in :class:`~mixkvq.config.MixKVQConfig`.

    Raises:
        ValueError: Triton has no tiles for a page of so many tokens.
    """
    if layout.tokens & (layout.tokens - 1):
        raise ValueError(
            f"The Triton kernels pack pages whose length is a power of two, not {layout.tokens} tokens: choose "
            "residual_length=32, 64, 128 or 256, or use MixKVQCache, which packs by torch operations where it must."
        )
    group = layout.value_dim // layout.value_groups
    value_tile = max(triton.next_power_of_2(group), MIN_DOT if rotated else 1)
    key_tile = min(triton.next_power_of_2(layout.key_dim), max(TILE // layout.tokens, 16))
    block = layout.value_dim & -layout.value_dim
    rotation_dim = max(triton.next_power_of_2(layout.value_dim), MIN_DOT)
    value_tokens = TILE // value_tile
    if rotated:
        value_tokens = min(value_tokens, ROTATED // rotation_dim)
    return PageFormat(
        heads=layout.kv_heads,
        tokens=layout.tokens,
        nbytes=layout.page.nbytes,
        keys=_side(layout, "key", layout.key_group, key_clip, key_unbiased, key_tile),
        values=_side(layout, "value", group, value_clip, value_unbiased, value_tile),
        tiers=tuple(_tier(layout, bits) for bits in layout.promoted_bits),
        key_dim=layout.key_dim,
        channels=triton.next_power_of_2(layout.kv_heads * layout.key_dim),
        params=Params.of(layout.param_dtype),
        dense_dtype=TRITON_TYPES[layout.dense_dtype],
        promoted_dtype=TRITON_TYPES[layout.promoted_dtype],
        words=min(max(value_tokens // WORD_BITS, 1), layout.tokens // WORD_BITS),
        rotated=rotated and layout.value_bits != DENSE_BITS,
        rotation=block**-0.5,
        rotation_dim=rotation_dim,
    )


def _side(layout: PageLayout, name: str, group: int, clip: bool, unbiased: bool, tile: int) -> Side:
    dim, bits, length = (
        (layout.key_dim, layout.key_bits, layout.tokens)
        if name == "key"
        else (layout.value_dim, layout.value_bits, layout.value_dim)
    )
    offsets, symmetric = layout.page.offsets, name == "value" and layout.value_symmetric
    return Side(
        dim=dim,
        bits=bits,
        dense=bits == DENSE_BITS,
        group=group,
        groups=length // group,
        planes=Planes.of(layout.page, f"{name}_plane", bits),
        copy=offsets.get(f"{name}s", 0),
        scale=offsets.get(f"{name}_scale", 0),
        zero=offsets.get(f"{name}_zero", 0),
        factors=(SYMMETRIC_FACTORS if symmetric else CLIP_FACTORS)[1:] if clip and is_clipped(bits) else (),
        gains=GAINS if unbiased else (),
        symmetric=symmetric,
        tile=tile,
    )


def _tier(layout: PageLayout, bits: int) -> Tier:
    record = layout.chunks[bits]
    dtype = next(field.dtype for field in record.fields if field.name == "channel")
    dense = bits == DENSE_BITS
    return Tier(
        bits=bits,
        dense=dense,
        extra=layout.extra_bits(bits),
        lanes=layout.lanes(bits),
        nbytes=record.nbytes,
        channel=record.offsets["channel"],
        channel_dtype=TRITON_TYPES[dtype],
        planes=Planes.of(record, "plane", DENSE_BITS if dense else layout.extra_bits(bits)),
        keys=record.offsets.get("keys", 0),
        run=layout.page.offsets[f"run_{bits}"],
        first_lane=layout.page.offsets[f"first_lane_{bits}"],
    )
