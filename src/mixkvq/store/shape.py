"""What decides the sizes of a statically shaped cache."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch

from mixkvq.store.layout import PageLayout

#: New tokens that the residual has room for beyond R, so that a step of several may run over a block's end.
OVERHANG = 8
#: Share of the channels that chunks are made for where thresholds decide and nothing was measured.
PROMOTED_SHARE = 0.25
#: What is allocated above the need that was measured on the first prompt.
MARGIN = 1.25


@dataclass(frozen=True)
class StaticShape:
    """What decides the tensors of a :class:`StaticStore`, apart from its capacity.

    Attributes:
        layout: the page format of every layer.
        layers, batch: quantized layers, sequences.
        sinks: tokens of each sequence that are never quantized.
        rotated: whether values are rotated before they are stored.
        chunks_per_page: by promoted width, if the same for all pages; None where data decides.
        statistics: whether anything is kept of the queries.
        sample_dtype: the type of samples of them; None without.
    """

    layout: PageLayout
    layers: int
    batch: int
    sinks: int
    rotated: bool
    chunks_per_page: dict[int, int] | None
    statistics: bool
    sample_dtype: torch.dtype | None = None

    def chunk_room(self, pages: int, shares: dict[int, float]) -> dict[int, int]:
        """Chunks to allocate for ``pages`` pages a layer, by promoted width; ``shares`` where data decides."""
        count, layout = self.layers * pages, self.layout
        if self.chunks_per_page is not None:
            return {bits: count * chunks for bits, chunks in self.chunks_per_page.items()}
        channels = layout.kv_heads * layout.key_dim
        room = {}
        for bits in layout.promoted_bits:
            lanes = layout.lanes(bits)
            spare = 0.5 if lanes > 1 else 0  # on average half of a page's last chunk has no channel
            room[bits] = math.ceil(count * (shares[bits] * channels / lanes + spare))
        return room


@dataclass(frozen=True)
class Capacity:
    """How much a cache can hold: one of the first two.

    Attributes:
        max_tokens: tokens in pages, of all sequences together; each also has its sinks and residual.
        max_bytes: bytes of all tensors.
        promoted_share: share of key channels that room is made for, for every promoted width, where thresholds decide;
            None measures it on the first prompt (with ``max_bytes`` a quarter is taken).
    """

    max_tokens: int | None = None
    max_bytes: int | None = None
    promoted_share: float | None = None

    def __post_init__(self) -> None:
        if (self.max_tokens is None) == (self.max_bytes is None):
            raise ValueError("Give the capacity of the cache: either max_tokens or max_bytes.")
        for name in ("max_tokens", "max_bytes"):
            given = getattr(self, name)
            if given is not None and not (isinstance(given, numbers.Integral) and int(given) >= 1):
                raise ValueError(f"{name} is a whole number of at least 1, not {given!r}.")
        if self.promoted_share is not None and not 0 <= self.promoted_share <= 1:
            raise ValueError(f"promoted_share lies between 0 and 1, not {self.promoted_share}.")
