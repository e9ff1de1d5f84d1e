"""The page format as compile-time constants of kernels that read pages, taken from ``store/layout.py``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton.language as tl

from mixkvq.kernels.triton.format import TRITON_TYPES
from mixkvq.quant.block import DENSE_BITS
from mixkvq.quant.planes import plane_widths, words_per_page
from mixkvq.store.layout import PageLayout, Record


@dataclass(frozen=True)
class ReadPlanes:
    """Bit planes of one array of codes, most significant first; none where the model's own type is stored.

    ``words`` of a plane hold a channel's codes of all tokens of a page; ``bits`` is the sum of ``widths``.
    """

    bits: int
    widths: tuple[int, ...]
    words: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.widths)


@dataclass(frozen=True)
class ReadTier:
    """One promoted width: where a page says which chunks it has, and what a chunk of so many lanes holds.

    ``dense`` tiers have the keys themselves, at ``keys``, the others ``planes``.
    """

    dense: bool
    run: int
    first_lane: int
    nbytes: int
    lanes: int
    channel: int
    channel_bytes: int
    keys: int
    planes: ReadPlanes


@dataclass(frozen=True)
class ReadFormat:
    """Offsets in bytes within a page, and the shapes of its fields (docs/format.md). Hashable, for ``tl.constexpr``.

    Where keys or values are ``dense``, the page holds them in the model's own type, at ``keys`` or ``values``. Types
    are those of scales and zeros, of everything that is not quantized, and of dense channels among quantized ones.
    """

    tokens: int
    nbytes: int
    param: tl.dtype
    stored: tl.dtype
    promoted: tl.dtype
    key_dim: int
    key_group: int
    dense_keys: bool
    keys: int
    key_planes: ReadPlanes
    key_scale: int
    key_zero: int
    value_dim: int
    value_groups: int
    dense_values: bool
    values: int
    value_planes: ReadPlanes
    value_scale: int
    value_zero: int
    value_levels: int
    value_symmetric: bool
    tiers: tuple[ReadTier, ...]

    @property
    def key_groups(self) -> int:
        return self.tokens // self.key_group

    @property
    def value_group_dim(self) -> int:
        return self.value_dim // self.value_groups

    @property
    def tile_starts(self) -> tuple[tuple[int, ...], ...]:
        """First tokens of the tiles of 16 tokens, by step; all tiles of a step are worked on together.

        A step of 128 tokens has the 8 positions of the same 16 words, so that words are loaded once. Pages that are
        not cut into such steps are one step.
        """
        if self.tokens % 128:
            return (tuple(range(0, self.tokens, 16)),)
        return tuple(tuple(range(16 * step, self.tokens, self.tokens // 8)) for step in range(self.tokens // 128))


@lru_cache(maxsize=64)
def read_format(layout: PageLayout) -> ReadFormat:
    """The constants of a layout; the same object every time."""
    page = layout.page.offsets
    return ReadFormat(
        tokens=layout.tokens,
        nbytes=layout.page.nbytes,
        param=TRITON_TYPES[layout.param_dtype],
        stored=TRITON_TYPES[layout.dense_dtype],
        promoted=TRITON_TYPES[layout.promoted_dtype],
        key_dim=layout.key_dim,
        key_group=layout.key_group,
        dense_keys=layout.key_bits == DENSE_BITS,
        keys=page.get("keys", 0),
        key_planes=_planes(layout.page, "key_plane", layout.key_bits, layout.tokens),
        key_scale=page.get("key_scale", 0),
        key_zero=page.get("key_zero", 0),
        value_dim=layout.value_dim,
        value_groups=layout.value_groups,
        dense_values=layout.value_bits == DENSE_BITS,
        values=page.get("values", 0),
        value_planes=_planes(layout.page, "value_plane", layout.value_bits, layout.tokens),
        value_scale=page.get("value_scale", 0),
        value_zero=page.get("value_zero", 0),
        value_levels=(1 << min(layout.value_bits, 8)) - 1,
        value_symmetric=layout.value_symmetric,
        tiers=tuple(_tier(layout, bits) for bits in layout.promoted_bits),
    )


def _tier(layout: PageLayout, bits: int) -> ReadTier:
    page, chunk = layout.page.offsets, layout.chunks[bits]
    dense = bits == DENSE_BITS
    return ReadTier(
        dense=dense,
        run=page[f"run_{bits}"],
        first_lane=page[f"first_lane_{bits}"],
        nbytes=chunk.nbytes,
        lanes=layout.lanes(bits),
        channel=chunk.offsets["channel"],
        channel_bytes=next(field.dtype.itemsize for field in chunk.fields if field.name == "channel"),
        keys=chunk.offsets.get("keys", 0),
        planes=_planes(chunk, "plane", DENSE_BITS if dense else layout.extra_bits(bits), layout.tokens),
    )


def _planes(record: Record, name: str, bits: int, tokens: int) -> ReadPlanes:
    widths = () if bits == DENSE_BITS else plane_widths(bits)
    return ReadPlanes(
        bits=sum(widths),
        widths=widths,
        words=tuple(words_per_page(tokens, width) for width in widths),
        offsets=tuple(record.offsets[f"{name}_{i}"] for i in range(len(widths))),
    )
