"""The page format, stated once: which fields a page has, where they lie, how many bytes they take.

A **page** holds a block of R tokens of all KV heads of one layer, as one run of bytes (docs/format.md):

* keys: one plane of ``[Hkv, words, D]`` 16-bit words per 2 bits of ``key_bits``, channels innermost; scale and zero
  ``[Hkv, R / G, D]``. The scale is that of the *base planes*: a promoted channel's extra planes count in units of
  ``scale / 2**extra_bits``, so reading the base planes takes no knowledge of tiers. A dense channel has scale and
  zero 0 and contributes nothing here. Keys that are quantized per token have scales as values have:
  ``[Hkv, groups, R]``.
* values: one plane of ``[Hkv, D, words]`` words per 2 bits, tokens innermost; scale and zero ``[Hkv, groups, R]``, or
  scale alone where groups are symmetric.
* outliers, of keys and of values: as many of each head, ``[Hkv, k]`` numbers and their places ``token * D + channel``.
* per promoted width: the run of **chunks** that holds its channels, and the first lane of every head in that run.

A chunk holds some promoted channels, its **lanes**: each lane's channel number and either the planes of the extra low
bits of 16 channels, ``[words, 16]``, or the keys of one dense channel, ``[R, 1]``. Lanes are filled head after head
without gaps, only a page's last chunk has some to spare, so counts may differ from head to head at no cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mixkvq.quant.block import DENSE_BITS
from mixkvq.quant.planes import plane_widths, words_per_page
from mixkvq.quant.rope import Rope

#: Channels of a chunk of extra planes: one tile of a matrix product. A dense channel, eight times as large, has a chunk
#: of its own, so that a page with one of them does not pay for 16.
PLANE_LANES = 16
#: Every field starts at a multiple of so many bytes, so that a GPU may load vectors.
ALIGNMENT = 16


@dataclass(frozen=True)
class Field:
    """One array in a record; ``part`` is the line of the memory report that it counts in."""

    name: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Record:
    """Fields one after the other in a run of bytes."""

    def __init__(self, fields: Iterable[Field]) -> None:
        self.fields = tuple(fields)
        self.offsets: dict[str, int] = {}
        end = 0
        for field in self.fields:
            self.offsets[field.name] = end
            end += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = end

    def views(self, data: Tensor) -> dict[str, Tensor]:
        """``data [N, nbytes]`` uint8 as one ``[N, *shape]`` view per field; nothing is copied."""
        views = {}
        for field in self.fields:
            offset = self.offsets[field.name]
            flat = data[:, offset : offset + field.nbytes].view(field.dtype)
            views[field.name] = flat.unflatten(1, field.shape)
        return views

    def part_bytes(self) -> dict[str, int]:
        """Bytes of one record by part; what alignment adds counts with the field before it."""
        parts: dict[str, int] = {}
        ends = [*list(self.offsets.values())[1:], self.nbytes]
        for field, end in zip(self.fields, ends, strict=True):
            parts[field.part] = parts.get(field.part, 0) + end - self.offsets[field.name]
        return parts


@dataclass(frozen=True)
class PageLayout:
    """The format of one layer's pages.

    Attributes:
        kv_heads, key_dim, value_dim: shape of the layer's cache.
        tokens: R, tokens of a page.
        key_bits, key_group: base width of keys and numbers per key scale: tokens, or channels.
        value_bits, value_groups: width of values and parts of a value vector with a scale each.
        value_symmetric: no zeros are stored for these.
        promoted_bits: widths above ``key_bits`` that single channels can have.
        param_dtype: type of scales and zeros.
        dense_dtype: type of everything that is not quantized: the model's own.
        key_axis: whether the tokens of a channel share a key scale, or the channels of a token.
        key_rotated: whether packed keys are Hadamard-rotated, so that queries have to be, too.
        key_rope: what was taken back from packed keys, before they were rotated, and has to be applied when they are
            read; None if they were packed as they came.
        key_levels, value_levels: what codes stand for; see :mod:`mixkvq.quant.levels`.
        outliers: share of the keys and values of a head that are kept apart; see :mod:`mixkvq.quant.outliers`.
        promoted_dtype: type of dense channels among quantized ones, and of outliers: 16 bits wide.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    tokens: int
    key_bits: int
    key_group: int
    value_bits: int
    value_groups: int
    promoted_bits: tuple[int, ...]
    param_dtype: torch.dtype
    dense_dtype: torch.dtype
    value_symmetric: bool = False
    key_axis: Literal["channel", "token"] = "channel"
    key_rotated: bool = False
    key_rope: Rope | None = None
    key_levels: tuple[float, ...] | None = None
    value_levels: tuple[float, ...] | None = None
    outliers: float = 0.0

    def __post_init__(self) -> None:
        irregular = self.key_axis == "token" or self.outliers or self.key_levels or self.key_rope is not None
        if irregular and self.promoted_bits:
            raise ValueError(
                f"Channels promoted to {self.promoted_bits} bits need key scales of their own, uniform levels and "
                "keys after RoPE: use key_axis='channel', key_rope='after', no key_levels and no outliers, or a policy "
                "that promotes none."
            )

    @cached_property
    def page(self) -> Record:
        """The record of one page."""
        return Record([*self._key_fields(), *self._value_fields(), *self._run_fields()])

    @cached_property
    def chunks(self) -> dict[int, Record]:
        """The record of one chunk, by promoted width."""
        return {bits: Record(self._chunk_fields(bits)) for bits in self.promoted_bits}

    def extra_bits(self, bits: int) -> int:
        """Bits of a promoted channel that lie in its chunk rather than in the base planes."""
        return bits - self.key_bits

    @property
    def promoted_dtype(self) -> torch.dtype:
        return self.dense_dtype if self.dense_dtype.itemsize == 2 else torch.bfloat16

    @property
    def key_outliers(self) -> int:
        """Keys of a page and head that are kept as they are."""
        return 0 if self.key_bits == DENSE_BITS else round(self.outliers * self.tokens * self.key_dim)

    @property
    def value_outliers(self) -> int:
        """Values of a page and head that are kept as they are."""
        return 0 if self.value_bits == DENSE_BITS else round(self.outliers * self.tokens * self.value_dim)

    @property
    def token_elements(self) -> int:
        """Numbers of one token, keys and values together."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    def lanes(self, bits: int) -> int:
        """Channels of a chunk of the given promoted width."""
        return 1 if bits == DENSE_BITS else PLANE_LANES

    def chunks_for(self, bits: int, channels: int) -> int:
        """Chunks that a page needs for so many channels promoted to a width."""
        return -(-channels // self.lanes(bits))

    def part_bytes(self, promoted: dict[int, int]) -> Counter[str]:
        """Bytes of one page and its chunks by part, with ``promoted`` channels of all heads together, by width."""
        parts = Counter(self.page.part_bytes())
        for bits, channels in promoted.items():
            for part, size in self.chunks[bits].part_bytes().items():
                parts[part] += self.chunks_for(bits, channels) * size
        return parts

    def _key_fields(self) -> list[Field]:
        if self.key_bits == DENSE_BITS:
            return [Field("keys", "key codes", self.dense_dtype, (self.kv_heads, self.tokens, self.key_dim))]
        params = (self.kv_heads, self.tokens // self.key_group, self.key_dim)
        if self.key_axis == "token":
            params = (self.kv_heads, self.key_dim // self.key_group, self.tokens)
        planes = [
            Field(
                f"key_plane_{i}",
                "key codes",
                torch.int16,
                (self.kv_heads, words_per_page(self.tokens, width), self.key_dim),
            )
            for i, width in enumerate(plane_widths(self.key_bits))
        ]
        return [
            *planes,
            Field("key_scale", "key scales", self.param_dtype, params),
            Field("key_zero", "key scales", self.param_dtype, params),
            *self._outlier_fields("key", self.key_outliers, self.key_dim),
        ]

    def _value_fields(self) -> list[Field]:
        if self.value_bits == DENSE_BITS:
            return [Field("values", "value codes", self.dense_dtype, (self.kv_heads, self.tokens, self.value_dim))]
        params = (self.kv_heads, self.value_groups, self.tokens)
        planes = [
            Field(
                f"value_plane_{i}",
                "value codes",
                torch.int16,
                (self.kv_heads, self.value_dim, words_per_page(self.tokens, width)),
            )
            for i, width in enumerate(plane_widths(self.value_bits))
        ]
        names = ("value_scale",) if self.value_symmetric else ("value_scale", "value_zero")
        scales = (Field(name, "value scales", self.param_dtype, params) for name in names)
        return [*planes, *scales, *self._outlier_fields("value", self.value_outliers, self.value_dim)]

    def _outlier_fields(self, kind: str, count: int, dim: int) -> list[Field]:
        if not count:
            return []
        place = torch.int16 if self.tokens * dim <= 1 << 15 else torch.int32
        part, shape = f"{kind} outliers", (self.kv_heads, count)
        return [Field(f"{kind}_outlier", part, self.promoted_dtype, shape), Field(f"{kind}_place", part, place, shape)]

    def _run_fields(self) -> list[Field]:
        return [
            field
            for bits in self.promoted_bits
            for field in (
                Field(f"run_{bits}", "tier index", torch.int32, (2,)),  # first chunk, number of chunks
                Field(f"first_lane_{bits}", "tier index", torch.int16, (self.kv_heads + 1,)),
            )
        ]

    def _chunk_fields(self, bits: int) -> list[Field]:
        channel_dtype = torch.uint8 if self.key_dim <= 256 else torch.int16
        channel = Field("channel", "tier index", channel_dtype, (self.lanes(bits),))
        if bits == DENSE_BITS:
            return [channel, Field("keys", "key codes", self.promoted_dtype, (self.tokens, 1))]
        planes = [
            Field(f"plane_{i}", "key codes", torch.int16, (words_per_page(self.tokens, width), PLANE_LANES))
            for i, width in enumerate(plane_widths(self.extra_bits(bits)))
        ]
        return [channel, *planes]
