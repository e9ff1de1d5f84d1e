"""Pools of records: one tensor of bytes that grows, and who uses which record of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixkvq.store.layout import Record


class RecordPool:
    """A growing array of records.

    Growing copies the packed bytes and leaves a spare 1/32 at most, so bytes held stay within about 3% of bytes used.
    It happens when a block is flushed, once in 128 steps at most.
    """

    def __init__(self, record: Record, device: torch.device) -> None:
        self.record = record
        self.limit: int | None = None  # records that are never exceeded by spare ones
        self.data = torch.empty(0, record.nbytes, dtype=torch.uint8, device=device)

    @property
    def capacity(self) -> int:
        return self.data.shape[0]

    @property
    def used(self) -> int:
        """Records that somebody refers to."""
        raise NotImplementedError

    def fields(self) -> dict[str, Tensor]:
        """Views ``[capacity, *shape]`` of every field."""
        return self.record.views(self.data)

    def keep(self, rows: Sequence[int], capacity: int) -> None:
        """Move the given records to the front of a new tensor for ``capacity`` records."""
        data = torch.empty(capacity, self.record.nbytes, dtype=torch.uint8, device=self.data.device)
        if rows:
            data[: len(rows)] = self.data[torch.tensor(rows, device=data.device)]
        self.data = data

    def grow(self, needed: int) -> None:
        """Make room for ``needed`` records, the first ones kept."""
        if needed > self.capacity:
            spare = needed // 32 if self.limit is None else min(needed // 32, max(self.limit - needed, 0))
            data = torch.empty(needed + spare, self.record.nbytes, dtype=torch.uint8, device=self.data.device)
            data[: self.capacity] = self.data
            self.data = data


class PagePool(RecordPool):
    """Pages with reference counts: sequences of a beam share the pages of their common past."""

    def __init__(self, record: Record, device: torch.device) -> None:
        super().__init__(record, device)
        self.references: list[int] = []
        self.free: list[int] = []

    @property
    def used(self) -> int:
        return len(self.references) - len(self.free)

    def live(self) -> list[int]:
        """Numbers of the pages that somebody refers to."""
        return [page for page, count in enumerate(self.references) if count]

    def allocate(self, count: int) -> list[int]:
        """Numbers of ``count`` pages to be written, each referred to once."""
        pages = [self.free.pop() for _ in range(min(count, len(self.free)))]
        first = len(self.references)
        fresh = range(first, first + count - len(pages))
        self.references.extend(0 for _ in fresh)
        self.grow(len(self.references))
        pages.extend(fresh)
        self.retain(pages)
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> list[int]:
        """Drop one reference each; returns the pages that nobody refers to any more."""
        dropped = []
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                dropped.append(page)
        self.free.extend(sorted(dropped, reverse=True))
        return dropped

    def compact(self) -> dict[int, int]:
        """Give unused pages back to the allocator; returns where each used page moved."""
        live = self.live()
        self.keep(live, len(live))
        self.references = [self.references[page] for page in live]
        self.free = []
        return {old: new for new, old in enumerate(live)}


class ChunkPool(RecordPool):
    """Runs of chunks, one run a page. Runs of dropped pages are squeezed out when room runs short."""

    def __init__(self, record: Record, device: torch.device) -> None:
        super().__init__(record, device)
        self.runs: dict[int, tuple[int, int]] = {}
        self.top = 0

    @property
    def used(self) -> int:
        return sum(count for _, count in self.runs.values())

    def allocate(self, pages: Sequence[int], counts: Sequence[int]) -> bool:
        """Runs of ``counts`` chunks for the given pages, in order and next to each other.

        Returns:
            Whether older runs moved, so that the pages' records of them must be written again.
        """
        moved = self.top + sum(counts) > self.capacity and self.top > self.used
        if moved:
            self.compact()
        self.grow(self.top + sum(counts))
        for page, count in zip(pages, counts, strict=True):
            self.runs[page] = (self.top, count)
            self.top += count
        return moved

    def release(self, pages: Sequence[int]) -> None:
        for page in pages:
            del self.runs[page]

    def compact(self) -> None:
        """Squeeze out runs that no page has any more."""
        rows: list[int] = []
        runs = {}
        for page, (start, count) in self.runs.items():
            runs[page] = (len(rows), count)
            rows.extend(range(start, start + count))
        self.keep(rows, len(rows))
        self.runs, self.top = runs, len(rows)

    def renumber(self, moved: dict[int, int]) -> None:
        """Follow pages to their new numbers."""
        self.runs = {moved[page]: run for page, run in self.runs.items()}
