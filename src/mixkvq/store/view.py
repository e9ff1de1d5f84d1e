"""The pages of a layer as kernels read them: slices of neighbouring pages, every field an array over pages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixkvq.store.layout import PageLayout
from mixkvq.store.pool import ChunkPool, PagePool


@dataclass(frozen=True)
class ChunkSlice:
    """The promoted channels of one width in N pages, padded to the page that has most.

    Attributes:
        channel: ``[N, lanes]`` int64, number of each lane's channel within its head.
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
        fields: every field of the page record, ``[N, ...]``.
        chunks: by promoted width; widths without a channel in these pages are left out.
    """

    layout: PageLayout
    sequence: Tensor
    fields: dict[str, Tensor]
    chunks: dict[int, ChunkSlice]


@dataclass(frozen=True)
class PackedPages:
    """All pages of a layer, ordered by sequence and position.

    Attributes:
        pages: numbers of the pages in their pool, the block tables one after the other.
        sequence: ``[N]`` int64, the batch row of each.
    """

    layout: PageLayout
    pages: tuple[int, ...]
    index: Tensor
    sequence: Tensor
    page_pool: PagePool = field(repr=False)
    chunk_pools: dict[int, ChunkPool] = field(repr=False)

    @classmethod
    def of(
        cls,
        layout: PageLayout,
        tables: Sequence[Sequence[int]],
        page_pool: PagePool,
        chunk_pools: dict[int, ChunkPool],
    ) -> PackedPages:
        """The view over some block tables."""
        pages = tuple(page for table in tables for page in table)
        rows = [row for row, table in enumerate(tables) for _ in table]
        device = page_pool.data.device
        return cls(
            layout,
            pages,
            torch.tensor(pages, device=device),
            torch.tensor(rows, device=device),
            page_pool,
            chunk_pools,
        )

    def __len__(self) -> int:
        return len(self.pages)

    def tensors(self) -> list[Tensor]:
        """What this view holds besides the pools."""
        return [self.index, self.sequence]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def slices(self, size: int) -> Iterator[PageSlice]:
        """The pages in order, at most ``size`` at once. Pages that are neighbours in memory are not copied."""
        for start in range(0, len(self), size):
            yield self._slice(start, min(start + size, len(self)))

    def _slice(self, start: int, stop: int) -> PageSlice:
        numbers = self.pages[start:stop]
        rows = _rows(self.page_pool.data, numbers, self.index[start:stop])
        fields = self.layout.page.views(rows)
        chunks = {
            bits: part
            for bits, pool in self.chunk_pools.items()
            if (part := self._chunk_slice(bits, pool, numbers, fields)) is not None
        }
        return PageSlice(self.layout, self.sequence[start:stop], fields, chunks)

    def _chunk_slice(
        self, bits: int, pool: ChunkPool, numbers: Sequence[int], fields: dict[str, Tensor]
    ) -> ChunkSlice | None:
        runs = [pool.runs[page] for page in numbers]
        most = max(count for _, count in runs)
        if most == 0:
            return None
        if all(run == (runs[0][0] + i * most, most) for i, run in enumerate(runs)):
            data = pool.data[runs[0][0] : runs[0][0] + len(runs) * most]
        else:
            wanted = fields[f"run_{bits}"][:, :1] + torch.arange(most, device=pool.data.device)
            # A page with fewer chunks than the most reads somebody else's, and `head` leaves them out.
            data = pool.data[wanted.clamp_(max=pool.top - 1).flatten()]
        views = {name: view.unflatten(0, (len(numbers), most)) for name, view in pool.record.views(data).items()}
        lane = torch.arange(most * self.layout.lanes(bits), device=pool.data.device)[:, None]
        first = fields[f"first_lane_{bits}"][:, None, :]
        head = (lane >= first[..., :-1]) & (lane < first[..., 1:])
        return ChunkSlice(views.pop("channel").flatten(1).long(), head, views)


def _rows(data: Tensor, numbers: Sequence[int], index: Tensor) -> Tensor:
    if numbers[-1] - numbers[0] == len(numbers) - 1 and all(b - a == 1 for a, b in itertools.pairwise(numbers)):
        return data[numbers[0] : numbers[-1] + 1]
    return data[index]
