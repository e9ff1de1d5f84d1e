"""One layer's cache: sinks, pages found through a block table, and the residual.

Sequences are independent of each other: padding is never stored, every sequence has its own length, and a token's
place follows from its number ``i`` and the length of the block table. The first ``sinks`` tokens stay where they are;
after them, token ``j = i - sinks`` belongs to block ``j // R``. Blocks that the table names are pages, and all later
tokens are the residual. :class:`~mixkvq.store.recent.RecentTokens` says when its oldest block is packed: as soon as it
is complete, unless a share of the context stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mixkvq.quant.block import QuantizedKeys, QuantizedValues
from mixkvq.store.appending import FullBlocks
from mixkvq.store.books import HostBooks, blocks_of
from mixkvq.store.dense import DenseSlots
from mixkvq.store.layout import PageLayout
from mixkvq.store.memory import MemoryReport, packed_report
from mixkvq.store.packing import chunk_counts, write_blocks
from mixkvq.store.pool import ChunkPool, PagePool
from mixkvq.store.recent import RecentTokens
from mixkvq.store.tensors import CacheTensors, places
from mixkvq.store.view import DenseTokens, PackedPages


class PagedStore:
    """Sinks, pages, residual and block table of one layer.

    Args:
        layout: the page format.
        batch: sequences.
        sinks: tokens of each sequence that are never quantized.
        device: where everything but the books is held.
        recent: which of the newest tokens are not packed yet.
    """

    def __init__(
        self,
        layout: PageLayout,
        batch: int,
        sinks: int,
        device: torch.device,
        recent: RecentTokens = RecentTokens(),  # noqa: B008  # frozen
    ) -> None:
        self.layout = layout
        self.sinks = sinks
        self.recent = recent
        self.lengths = [0] * batch
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.pages = PagePool(layout.page, device)
        self.chunks = {bits: ChunkPool(record, device) for bits, record in layout.chunks.items()}
        self.slots = DenseSlots(layout, batch, sinks, device)
        self._packed: PackedPages | None = None
        self._books = HostBooks(device)

    @property
    def chunk_data(self) -> dict[int, Tensor]:
        """The chunks' records by promoted width."""
        return {bits: pool.data for bits, pool in self.chunks.items()}

    @property
    def dense_keys(self) -> Tensor:
        """Keys of sinks and residual, ``[B, Hkv, slots, D]``."""
        return self.slots.keys

    @property
    def dense_values(self) -> Tensor:
        """Their values."""
        return self.slots.values

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.dense_keys.device

    # Tokens come in

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None = None) -> Iterator[FullBlocks]:
        """Add new tokens, and yield the blocks that they complete, which the caller must :meth:`write`.

        Args:
            keys, values: ``[B, Hkv, L, D]``.
            real: ``[B, L]`` bool, False at padding, which is not stored. None if all are real.
        """
        if keys.shape[2] == 1 and real is None:
            parts = self._append_one(keys, values)
        else:
            parts = FullBlocks.joined(self._append_rows(keys, values, real))
        packed = False
        for blocks in parts:
            yield blocks
            packed = True
        if packed:
            self.slots.shrink(self._most_filled())

    def _append_rows(self, keys: Tensor, values: Tensor, real: Tensor | None) -> Iterator[FullBlocks]:
        for row in range(self.batch):
            k, v = keys[row], values[row]
            if real is not None:
                k, v = k[:, real[row]], v[:, real[row]]
            yield from self._append_many(row, k, v)

    def _append_one(self, keys: Tensor, values: Tensor) -> Iterator[FullBlocks]:
        slots = [self._filled(row) for row in range(self.batch)]
        self.slots.grow(max(slots, default=0) + 1)
        same = len(set(slots)) == 1
        self.slots.put_one(slots[0] if same else self._on_device(slots), keys[:, :, 0], values[:, :, 0])
        self.lengths = [length + 1 for length in self.lengths]
        self._books.step()
        ready = [self._blocks_to_pack(row) for row in range(self.batch)]
        for blocks in sorted({*ready} - {0}):
            rows = [row for row, count in enumerate(ready) if count == blocks]
            taken = self.slots.take(rows, blocks, max(self._filled(row) for row in rows))
            yield FullBlocks(*taken, [row for row in rows for _ in range(blocks)])

    def _on_device(self, slots: Sequence[int]) -> Tensor:
        """The slots ``[B]`` int64 of every sequence's next token, where these differ."""
        if self.recent.share:  # what is packed is known on the host alone
            return torch.tensor(slots).to(self.device)
        _, filled = places(self.device_lengths(), self.sinks, self.layout.tokens)
        return filled.long()

    def _append_many(self, row: int, keys: Tensor, values: Tensor) -> Iterator[FullBlocks]:
        length, size = self.lengths[row], self.layout.tokens
        to_sinks = min(max(self.sinks - length, 0), keys.shape[1])
        self.slots.put(row, length, keys[:, :to_sinks], values[:, :to_sinks])
        waiting = self._waiting(row)
        self.lengths[row] += keys.shape[1]
        keys, values = keys[:, to_sinks:], values[:, to_sinks:]
        blocks = self._blocks_to_pack(row)
        if blocks:
            old = slice(self.sinks, self.sinks + waiting)
            keys = torch.cat([self.dense_keys[row, :, old], keys.to(self.dense_keys.dtype)], 1)
            values = torch.cat([self.dense_values[row, :, old], values.to(self.dense_values.dtype)], 1)
            full_keys = keys[:, : blocks * size].unflatten(1, (blocks, size)).transpose(0, 1)
            full_values = values[:, : blocks * size].unflatten(1, (blocks, size)).transpose(0, 1)
            keys, values = keys[:, blocks * size :], values[:, blocks * size :]
            waiting = 0
            yield FullBlocks(full_keys, full_values, [row] * blocks)
        self.slots.grow(self.sinks + waiting + keys.shape[1])
        self.slots.put(row, self.sinks + waiting, keys, values)
        self._books.forget_lengths()

    def _waiting(self, row: int) -> int:
        """Tokens of a sequence in the residual."""
        return max(self.lengths[row] - self.sinks - self.layout.tokens * len(self.tables[row]), 0)

    def _blocks_to_pack(self, row: int) -> int:
        """Complete blocks in the residual of a sequence that do not stay there."""
        return self.recent.blocks_to_pack(self._waiting(row), self.lengths[row], self.layout.tokens)

    def _filled(self, row: int) -> int:
        """Dense slots that a sequence uses: its sinks, and after them its residual."""
        return min(self.lengths[row], self.sinks) + self._waiting(row)

    def _most_filled(self) -> int:
        return max((self._filled(row) for row in range(self.batch)), default=0)

    # Blocks become pages

    def reserve(
        self, sequences: Sequence[int], chunk_counts: Mapping[int, Sequence[int]]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Pages for N blocks, at the ends of their sequences' block tables, for the caller to write.

        Args:
            chunk_counts: by promoted width, the chunks of each block.

        Returns:
            ``[N]`` int32, the pages' records in their pool, and by promoted width ``[N]`` int32, the first records of
            their runs of chunks.
        """
        self._tables_changed()  # first, as the view would keep pools alive that are about to grow
        pages = self.pages.allocate(len(sequences))
        for row, page in zip(sequences, pages, strict=True):
            self.tables[row].append(page)
        run_starts = {}
        for bits, pool in self.chunks.items():
            older = list(pool.runs)
            if pool.allocate(pages, chunk_counts[bits]) and older:
                self._write_runs(bits, older)
            run_starts[bits] = self._numbers([pool.runs[page][0] for page in pages])
        return self._numbers(pages), run_starts

    def next_tokens(self, sequences: Sequence[int]) -> Tensor:
        """The numbers in their sequences of the first tokens of N blocks that wait for their pages, ``[N]`` int64."""
        blocks = {row: len(self.tables[row]) for row in sequences}
        numbers = []
        for row in sequences:
            numbers.append(self.sinks + blocks[row] * self.layout.tokens)
            blocks[row] += 1
        return torch.tensor(numbers, device=self.device)

    def write(self, sequences: Sequence[int], keys: QuantizedKeys, values: QuantizedValues) -> None:
        """Pack N quantized blocks into pages and append those to their sequences' block tables."""
        counts = {bits: chunk_counts(self.layout, bits, keys.bits).tolist() for bits in self.chunks}
        pages, run_starts = self.reserve(sequences, counts)
        write_blocks(self.layout, self.pages.data, self.chunk_data, keys, values, pages, run_starts)

    def replace_pages(self, layout: PageLayout, pages: Tensor) -> None:
        """The same pages in another format, without promoted channels: ``[capacity, layout.page.nbytes]`` uint8."""
        self._tables_changed()
        self.layout = layout
        self.pages.record, self.pages.data = layout.page, pages

    def _write_runs(self, bits: int, pages: list[int]) -> None:
        runs = self._numbers([self.chunks[bits].runs[page] for page in pages])
        self.pages.fields()[f"run_{bits}"][self._numbers(pages).long()] = runs

    def _numbers(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).to(self.device)

    def _tables_changed(self) -> None:
        self._packed = None
        self._books.forget_table()

    # Tokens are read

    def packed(self) -> PackedPages | None:
        """All pages of all sequences, in order; None if there are none."""
        if self._packed is None and any(self.tables):
            self._packed = PackedPages.of(self.layout, self.tables, self.sinks, self.pages.data, self.chunk_data)
        return self._packed

    def only(self, row: int, block: int) -> PackedPages:
        """A view of one block's page, as if it were the only page of the only sequence."""
        table, start = [self.tables[row][block]], self.sinks + block * self.layout.tokens
        view = PackedPages.of(self.layout, [table], start, self.pages.data, self.chunk_data)
        assert view is not None
        return view

    def dense(self) -> DenseTokens:
        """Sinks and residual of all sequences."""
        return DenseTokens.of(self.dense_keys, self.dense_values, [self._filled(row) for row in range(self.batch)])

    def device_lengths(self) -> Tensor:
        """Tokens stored of each sequence, ``[B]`` int32 on the device: valid until the next change."""
        return self._books.lengths(self.lengths)

    def cache_tensors(self, rotated: bool) -> CacheTensors:
        """The same for kernels on a device. The books are copied there only when something other than a step of one
        token has changed them.

        Args:
            rotated: whether values were rotated before they were stored.

        Raises:
            ValueError: a share of the context is kept as it is, and kernels take places to follow from lengths.
        """
        if self.recent.share:
            raise ValueError(
                f"Kernels find tokens by their numbers, and this cache keeps a share of the context (recent="
                f"{self.recent.share:g}) out of its pages: read it by attend()."
            )
        return CacheTensors(
            layout=self.layout,
            sinks=self.sinks,
            rotated=rotated,
            pages=self.pages.data,
            chunks=self.chunk_data,
            table=self._books.table(self.tables),
            lengths=self.device_lengths(),
            dense_keys=self.dense_keys,
            dense_values=self.dense_values,
        )

    # Sequences come and go

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given batch rows in that order; a row may be named several times and shares its pages then."""
        tables = [list(self.tables[row]) for row in rows]
        for table in tables:
            self.pages.retain(table)
        old, self.tables = self.tables, tables
        self._books.forget_lengths()
        self.lengths = [self.lengths[row] for row in rows]
        at = torch.tensor(list(rows), dtype=torch.long, device=self.device)
        self.slots.select(at)
        self.slots.shrink(self._most_filled())
        for table in old:
            self._release(table)
        self._compact()

    def crop(self, row: int, length: int, restored: tuple[Tensor, Tensor] | None = None) -> None:
        """Cut a sequence to its first ``length`` tokens.

        Args:
            restored: keys and values ``[Hkv, n, D]`` of the last, now incomplete block, where the cut runs through a
                page: they go back to the residual (:meth:`cut_page` says which page that is).
        """
        blocks = blocks_of(length, self.sinks, self.layout.tokens)
        self._release(self.tables[row][blocks:])
        self.tables[row] = self.tables[row][:blocks]
        self.lengths[row] = length
        self._books.forget_lengths()
        self.slots.clear(row, self._filled(row))
        if restored is not None:
            self.slots.put(row, self.sinks, *restored)
        self.slots.shrink(self._most_filled())
        self._compact()

    def cut_page(self, row: int, length: int) -> tuple[int, int] | None:
        """The block that a cut to ``length`` tokens runs through, if packed, and how many of its tokens are left."""
        block, left = divmod(max(length - self.sinks, 0), self.layout.tokens)
        if left and block < len(self.tables[row]):
            return block, left
        return None

    def _release(self, table: list[int]) -> None:
        dropped = self.pages.release(table)
        for pool in self.chunks.values():
            pool.release(dropped)
        self._tables_changed()

    def _compact(self) -> None:
        """Give memory back when a quarter of the pages is unused."""
        if 4 * self.pages.used >= 3 * self.pages.capacity:
            return
        moved = self.pages.compact()
        self.tables = [[moved[page] for page in table] for table in self.tables]
        for bits, pool in self.chunks.items():
            pool.renumber(moved)
            pool.compact()
            if pool.runs:
                self._write_runs(bits, list(pool.runs))
        self._tables_changed()

    # Bytes are counted

    def memory(self) -> MemoryReport:
        """What this layer holds, from the sizes of its tensors."""
        layout = self.layout
        report = packed_report(layout, self.pages.used, {bits: self._promoted(bits) for bits in self.chunks})
        parts = report.parts
        for pool in (self.pages, *self.chunks.values()):
            for part, size in pool.record.part_bytes().items():
                parts[part] += pool.used * size
            parts["spare"] += pool.data.nbytes - pool.used * pool.record.nbytes
        dense = self.slots.nbytes
        parts["sinks"] = dense * self.sinks // self.slots.count
        parts["residual"] = dense - parts["sinks"]
        parts["tables"] = sum(tensor.nbytes for tensor in self._held_books())
        report.elements = layout.token_elements * sum(self.lengths)
        report.counts_all = self.recent.share > 0 and self.pages.used > 0
        report.check(self.tensors())
        return report

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        held = [self.pages.data, *(pool.data for pool in self.chunks.values())]
        held += [self.dense_keys, self.dense_values]
        return held + self._held_books()

    def _held_books(self) -> list[Tensor]:
        return self._books.tensors() + ([] if self._packed is None else self._packed.tensors())

    def _promoted(self, bits: int) -> int:
        """Channels of one promoted tier, over all pages in use."""
        live = self.pages.live()
        last = self.pages.fields()[f"first_lane_{bits}"][live, -1]
        return int(last.sum(dtype=torch.int64)) if live else 0
