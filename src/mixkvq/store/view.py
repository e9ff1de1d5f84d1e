"""A layer's tokens as the torch kernels read them: dense tokens, and slices of neighbouring pages field by field."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixkvq.store.layout import PageLayout
from mixkvq.store.tensors import CacheTensors


@dataclass(frozen=True)
class DenseTokens:
    """Sinks and residual: ``keys, values [B, Hkv, T, D]``; ``mask [B, T]`` bool where sequences differ, or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, filled: Sequence[int]) -> DenseTokens:
        """The first ``filled[b]`` slots of ``keys, values [B, Hkv, slots, D]``; masked slots hold finite numbers."""
        end = max(filled, default=0)
        keys, values = keys[:, :, :end], values[:, :, :end]
        if len(set(filled)) <= 1:
            return cls(keys, values, None)
        # A sequence has residual tokens only once its sinks are full: what it has is always a prefix of the slots.
        mask = (torch.arange(end) < torch.tensor(filled)[:, None]).to(keys.device)
        return cls(keys, values, mask)

    @classmethod
    def of_cache(cls, cache: CacheTensors) -> DenseTokens:
        """The dense tokens of a cache whose unfilled slots may hold anything. Waits for the device."""
        _, filled = cache.places()
        dense = cls.of(cache.dense_keys, cache.dense_values, filled.tolist())
        if dense.mask is None:
            return dense
        # A masked slot is multiplied by a probability of zero, which would not silence a NaN.
        return cls(dense.keys, dense.values.masked_fill(~dense.mask[:, None, :, None], 0), dense.mask)


@dataclass(frozen=True)
class ChunkSlice:
    """The promoted channels of one width in N pages, padded to the page that has most.

    Attributes:
        channel: ``[N, lanes]`` int64, number of each lane's channel within its head; 0 at padding.
        head: ``[N, lanes, Hkv]`` bool, True at the head that owns the lane; all False at padding.
        fields: the chunks' planes or keys, ``[N, chunks, words or R, lanes of a chunk]``.
    """

    channel: Tensor
    head: Tensor
    fields: dict[str, Tensor]


@dataclass(frozen=True)
class PageSlice:
    """N pages.

    Attributes:
        sequence: ``[N]`` int64, the batch row of each page.
        first: ``[N]`` int64, the number in its sequence of each page's first token.
        fields: every field of the page record, ``[N, ...]``.
        chunks: by promoted width; widths without a channel in these pages are left out.
    """

    layout: PageLayout
    sequence: Tensor
    first: Tensor
    fields: dict[str, Tensor]
    chunks: dict[int, ChunkSlice]


@dataclass(frozen=True)
class PackedPages:
    """All pages of a layer, ordered by sequence and position.

    Attributes:
        numbers: of the pages in their pool, the block tables one after the other.
        index: the same, ``[N]`` int64 on the device.
        sequence: ``[N]`` int64, the batch row of each.
        first: ``[N]`` int64, the number in its sequence of the first token of each.
        pages, chunks: the pools: ``[P, nbytes]`` uint8, and by promoted width ``[C, nbytes]``.
    """

    layout: PageLayout
    numbers: tuple[int, ...]
    index: Tensor
    sequence: Tensor
    first: Tensor
    pages: Tensor = field(repr=False)
    chunks: dict[int, Tensor] = field(repr=False)

    @classmethod
    def of(
        cls, layout: PageLayout, tables: Sequence[Sequence[int]], start: int, pages: Tensor, chunks: dict[int, Tensor]
    ) -> PackedPages | None:
        """The view over some block tables; None if there is no page in them.

        Args:
            start: number of the first token of each table's first page: the sinks come before it.
        """
        numbers = tuple(page for table in tables for page in table)
        if not numbers:
            return None
        rows = [row for row, table in enumerate(tables) for _ in table]
        tokens = [start + layout.tokens * block for table in tables for block in range(len(table))]
        index, sequence, first = (torch.tensor(x, device=pages.device) for x in (numbers, rows, tokens))
        return cls(layout, numbers, index, sequence, first, pages, chunks)

    @classmethod
    def of_cache(cls, cache: CacheTensors) -> PackedPages | None:
        """The view over a cache whose books are on the device, for which it waits."""
        blocks, _ = cache.places()
        counts = blocks.tolist()
        tables = cache.table[:, : max(counts, default=0)].tolist()
        tables = [table[:count] for table, count in zip(tables, counts, strict=True)]
        return cls.of(cache.layout, tables, cache.sinks, cache.pages, cache.chunks)

    def __len__(self) -> int:
        return len(self.numbers)

    def tensors(self) -> list[Tensor]:
        """What this view holds besides the pools."""
        return [self.index, self.sequence, self.first]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def slices(self, size: int) -> Iterator[PageSlice]:
        """The pages in order, at most ``size`` at once. Pages that are neighbours in memory are not copied."""
        for start in range(0, len(self), size):
            yield self._slice(start, min(start + size, len(self)))

    def _slice(self, start: int, stop: int) -> PageSlice:
        rows = _rows(self.pages, self.numbers[start:stop], self.index[start:stop])
        fields = self.layout.page.views(rows)
        chunks = {bits: part for bits in self.chunks if (part := self._chunk_slice(bits, fields)) is not None}
        return PageSlice(self.layout, self.sequence[start:stop], self.first[start:stop], fields, chunks)

    def _chunk_slice(self, bits: int, fields: dict[str, Tensor]) -> ChunkSlice | None:
        data = self.chunks[bits]
        runs = fields[f"run_{bits}"].tolist()
        most = max(count for _, count in runs)
        if most == 0:
            return None
        first = runs[0][0]
        if all(run == [first + i * most, most] for i, run in enumerate(runs)):
            rows = data[first : first + len(runs) * most]
        else:
            wanted = fields[f"run_{bits}"][:, :1] + torch.arange(most, device=data.device)
            # A page with fewer chunks than the most reads somebody else's, and `head` leaves them out.
            rows = data[wanted.clamp_(max=data.shape[0] - 1).flatten()]
        views = self.layout.chunks[bits].views(rows)
        views = {name: view.unflatten(0, (len(runs), most)) for name, view in views.items()}
        lane = torch.arange(most * self.layout.lanes(bits), device=data.device)[:, None]
        first_lane = fields[f"first_lane_{bits}"][:, None, :]
        head = (lane >= first_lane[..., :-1]) & (lane < first_lane[..., 1:])
        channel = views.pop("channel").flatten(1).long().masked_fill(~head.any(2), 0)
        return ChunkSlice(channel, head, views)


def _rows(data: Tensor, numbers: Sequence[int], index: Tensor) -> Tensor:
    if numbers[-1] - numbers[0] == len(numbers) - 1 and all(b - a == 1 for a, b in itertools.pairwise(numbers)):
        return data[numbers[0] : numbers[-1] + 1]
    return data[index]
