"""One layer's cache: sinks, pages found through a block table, and the residual.

Sequences are independent of each other: padding is never stored, every sequence has its own length, and a token's
place follows from its number ``i`` alone. The first ``sinks`` tokens stay where they are; after them, token ``j = i -
sinks`` belongs to block ``j // R``, which is a page once it is complete and the residual until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixkvq.quant.affine import storable
from mixkvq.quant.block import DENSE_BITS, QuantizedKeys, QuantizedValues
from mixkvq.quant.planes import pack, plane_widths, split_planes
from mixkvq.store.layout import PageLayout
from mixkvq.store.memory import MemoryReport
from mixkvq.store.pool import ChunkPool, PagePool
from mixkvq.store.view import PackedPages


@dataclass(frozen=True)
class FullBlocks:
    """Blocks that are complete and wait to be quantized: ``keys, values [N, Hkv, R, D]``, ``sequences`` N rows."""

    keys: Tensor
    values: Tensor
    sequences: list[int]


@dataclass(frozen=True)
class DenseTokens:
    """Sinks and residual: ``keys, values [B, Hkv, T, D]``; ``mask [B, T]`` bool where sequences differ, or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None


class PagedStore:
    """Sinks, pages, residual and block table of one layer.

    Args:
        layout: the page format.
        batch: sequences.
        sinks: tokens of each sequence that are never quantized.
        device: where everything but the books is held.
    """

    def __init__(self, layout: PageLayout, batch: int, sinks: int, device: torch.device) -> None:
        self.layout = layout
        self.sinks = sinks
        self.lengths = [0] * batch
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.pages = PagePool(layout.page, device)
        self.chunks = {bits: ChunkPool(record, device) for bits, record in layout.chunks.items()}
        # Zeros, because masked slots are multiplied by a probability of zero, which would not silence a NaN.
        shape = (batch, layout.kv_heads, sinks + layout.tokens)
        self.dense_keys = torch.zeros(*shape, layout.key_dim, dtype=layout.dense_dtype, device=device)
        self.dense_values = torch.zeros(*shape, layout.value_dim, dtype=layout.dense_dtype, device=device)
        self._packed: PackedPages | None = None

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
            yield from self._append_one(keys, values)
            return
        for row in range(self.batch):
            k, v = keys[row], values[row]
            if real is not None:
                k, v = k[:, real[row]], v[:, real[row]]
            yield from self._append_many(row, k, v)

    def _append_one(self, keys: Tensor, values: Tensor) -> Iterator[FullBlocks]:
        slots = [self._slot(length) for length in self.lengths]
        if len(set(slots)) == 1:
            self.dense_keys[:, :, slots[0]] = keys[:, :, 0]
            self.dense_values[:, :, slots[0]] = values[:, :, 0]
        else:
            rows, columns = torch.arange(self.batch), torch.tensor(slots)
            self.dense_keys[rows, :, columns] = keys[:, :, 0]
            self.dense_values[rows, :, columns] = values[:, :, 0]
        self.lengths = [length + 1 for length in self.lengths]
        full = [row for row, slot in enumerate(slots) if slot == self.sinks + self.layout.tokens - 1]
        if full:
            yield FullBlocks(self.dense_keys[full, :, self.sinks :], self.dense_values[full, :, self.sinks :], full)

    def _append_many(self, row: int, keys: Tensor, values: Tensor) -> Iterator[FullBlocks]:
        length, size = self.lengths[row], self.layout.tokens
        to_sinks = min(max(self.sinks - length, 0), keys.shape[1])
        self._put(row, length, keys[:, :to_sinks], values[:, :to_sinks])
        keys, values = keys[:, to_sinks:], values[:, to_sinks:]
        self.lengths[row] += to_sinks
        waiting = self._waiting(row)
        blocks = (waiting + keys.shape[1]) // size
        if blocks:
            old = slice(self.sinks, self.sinks + waiting)
            keys = torch.cat([self.dense_keys[row, :, old], keys.to(self.dense_keys.dtype)], 1)
            values = torch.cat([self.dense_values[row, :, old], values.to(self.dense_values.dtype)], 1)
            full_keys = keys[:, : blocks * size].unflatten(1, (blocks, size)).transpose(0, 1)
            full_values = values[:, : blocks * size].unflatten(1, (blocks, size)).transpose(0, 1)
            keys, values = keys[:, blocks * size :], values[:, blocks * size :]
            self.lengths[row] += blocks * size - waiting
            yield FullBlocks(full_keys, full_values, [row] * blocks)
        self._put(row, self._slot(self.lengths[row]), keys, values)
        self.lengths[row] += keys.shape[1]

    def _slot(self, token: int) -> int:
        """Where token number ``token`` lies among the dense slots, sinks first."""
        return token if token < self.sinks else self.sinks + (token - self.sinks) % self.layout.tokens

    def _waiting(self, row: int) -> int:
        """Tokens of a sequence in the residual."""
        return max(self.lengths[row] - self.sinks, 0) % self.layout.tokens

    def _filled(self, row: int) -> int:
        """Dense slots that a sequence uses: its sinks, and after them its residual."""
        return min(self.lengths[row], self.sinks) + self._waiting(row)

    def _put(self, row: int, slot: int, keys: Tensor, values: Tensor) -> None:
        count = keys.shape[1]
        self.dense_keys[row, :, slot : slot + count] = keys
        self.dense_values[row, :, slot : slot + count] = values

    # Blocks become pages

    def write(self, sequences: Sequence[int], keys: QuantizedKeys, values: QuantizedValues) -> None:
        """Pack N quantized blocks into pages and append those to their sequences' block tables."""
        pages = self.pages.allocate(len(sequences))
        for row, page in zip(sequences, pages, strict=True):
            self.tables[row].append(page)
        at = torch.tensor(pages, device=self.device)
        fields = self.pages.fields()
        for name, data in self._page_fields(keys, values):
            fields[name][at] = data.to(fields[name].dtype)
        for bits in self.chunks:
            self._write_chunks(bits, pages, keys)
        self._packed = None

    def _page_fields(self, keys: QuantizedKeys, values: QuantizedValues) -> Iterator[tuple[str, Tensor]]:
        layout = self.layout
        if layout.key_bits == DENSE_BITS:
            yield "keys", keys.dense
        else:
            extra = self._extra_bits(keys.bits)
            for i, plane in enumerate(split_planes(keys.codes >> extra[:, :, None], layout.key_bits)):
                yield f"key_plane_{i}", pack(plane, plane_widths(layout.key_bits)[i], dim=-2)
            yield "key_scale", storable(keys.scale * 2.0 ** extra[:, :, None], layout.param_dtype)
            yield "key_zero", keys.zero
        if layout.value_bits == DENSE_BITS:
            yield "values", values.dense
        else:
            for i, plane in enumerate(split_planes(values.codes.transpose(2, 3), layout.value_bits)):
                yield f"value_plane_{i}", pack(plane, plane_widths(layout.value_bits)[i], dim=-1)
            yield "value_scale", values.scale.transpose(2, 3)
            yield "value_zero", values.zero.transpose(2, 3)

    def _extra_bits(self, bits: Tensor) -> Tensor:
        """How many low bits of each channel's codes lie outside the base planes; 0 for dense channels."""
        return torch.where(bits == DENSE_BITS, 0, bits - self.layout.key_bits)

    def _write_chunks(self, bits: int, pages: list[int], keys: QuantizedKeys) -> None:
        """Put the channels of one promoted tier into chunks, lane after lane, head after head."""
        promoted = keys.bits == bits
        per_head = promoted.sum(2)
        counts = per_head.sum(1).tolist()
        chunk_counts = [self.layout.chunks_for(bits, count) for count in counts]
        pool = self.chunks[bits]
        if pool.allocate(pages, chunk_counts):
            self._write_runs(bits, list(pool.runs))
        else:
            self._write_runs(bits, pages)
        at = torch.tensor(pages, device=self.device)
        first_lane = torch.nn.functional.pad(per_head.cumsum(1), (1, 0))
        self.pages.fields()[f"first_lane_{bits}"][at] = first_lane.to(torch.int16)

        total, width = sum(chunk_counts), self.layout.lanes(bits)
        if not total:
            return
        block, head, channel = promoted.nonzero(as_tuple=True)
        chunks = torch.tensor(chunk_counts, device=self.device)
        channels_before = first_lane[:, -1].cumsum(0) - first_lane[:, -1]
        lanes_before = (chunks.cumsum(0) - chunks) * width
        lane = torch.arange(len(block), device=self.device) - channels_before[block] + lanes_before[block]
        source = keys.dense if bits == DENSE_BITS else keys.codes & ((1 << self.layout.extra_bits(bits)) - 1)
        lanes = source.new_zeros(total * width, self.layout.tokens)
        lanes[lane] = source[block, head, :, channel]
        tokens_by_lane = lanes.unflatten(0, (total, width)).transpose(1, 2)  # [chunks, R, lanes]

        start = pool.runs[pages[0]][0]
        fields = {name: view[start : start + total] for name, view in pool.fields().items()}
        numbers = torch.zeros(total * width, dtype=torch.long, device=self.device)
        numbers[lane] = channel
        fields["channel"].copy_(numbers.view(total, width))
        if bits == DENSE_BITS:
            fields["keys"].copy_(tokens_by_lane)
            return
        extra = self.layout.extra_bits(bits)
        for i, plane in enumerate(split_planes(tokens_by_lane, extra)):
            fields[f"plane_{i}"].copy_(pack(plane, plane_widths(extra)[i], dim=-2))

    def _write_runs(self, bits: int, pages: list[int]) -> None:
        runs = torch.tensor([self.chunks[bits].runs[page] for page in pages], dtype=torch.int32)
        at = torch.tensor(pages, device=self.device)
        self.pages.fields()[f"run_{bits}"][at] = runs.to(self.device)

    # Tokens are read

    def packed(self) -> PackedPages | None:
        """All pages of all sequences, in order; None if there are none."""
        if self._packed is None and any(self.tables):
            self._packed = PackedPages.of(self.layout, self.tables, self.pages, self.chunks)
        return self._packed

    def only(self, page: int) -> PackedPages:
        """A view of one page, as if it were the only page of the only sequence."""
        return PackedPages.of(self.layout, [[page]], self.pages, self.chunks)

    def dense(self) -> DenseTokens:
        """Sinks and residual of all sequences."""
        ends = [self._filled(row) for row in range(self.batch)]
        end = max(ends, default=0)
        keys, values = self.dense_keys[:, :, :end], self.dense_values[:, :, :end]
        if len(set(ends)) <= 1:
            return DenseTokens(keys, values, None)
        # A sequence has residual tokens only once its sinks are full: what it has is always a prefix of the slots.
        mask = torch.arange(end) < torch.tensor(ends)[:, None]
        return DenseTokens(keys, values, mask.to(self.device))

    # Sequences come and go

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given batch rows in that order; a row may be named several times and shares its pages then."""
        tables = [list(self.tables[row]) for row in rows]
        for table in tables:
            self.pages.retain(table)
        old, self.tables = self.tables, tables
        self.lengths = [self.lengths[row] for row in rows]
        at = torch.tensor(list(rows), dtype=torch.long, device=self.device)
        self.dense_keys, self.dense_values = self.dense_keys[at], self.dense_values[at]
        for table in old:
            self._release(table)
        self._compact()

    def crop(self, row: int, length: int, restored: tuple[Tensor, Tensor] | None = None) -> None:
        """Cut a sequence to its first ``length`` tokens.

        Args:
            restored: keys and values ``[Hkv, n, D]`` of the last, now incomplete block, where the cut runs through a
                page: they go back to the residual (:meth:`cut_page` says which page that is).
        """
        blocks = max(length - self.sinks, 0) // self.layout.tokens
        self._release(self.tables[row][blocks:])
        self.tables[row] = self.tables[row][:blocks]
        self.lengths[row] = length
        # What was cut may be anything, and a masked slot must be finite.
        left = self._filled(row)
        self.dense_keys[row, :, left:] = 0
        self.dense_values[row, :, left:] = 0
        if restored is not None:
            self._put(row, self.sinks, *restored)
        self._compact()

    def cut_page(self, row: int, length: int) -> tuple[int, int] | None:
        """The page that a cut to ``length`` tokens runs through, and how many of its tokens are left, or None."""
        block, left = divmod(max(length - self.sinks, 0), self.layout.tokens)
        if left and block < len(self.tables[row]):
            return self.tables[row][block], left
        return None

    def _release(self, table: list[int]) -> None:
        dropped = self.pages.release(table)
        for pool in self.chunks.values():
            pool.release(dropped)
        self._packed = None

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
        self._packed = None

    # Bytes are counted

    def memory(self) -> MemoryReport:
        """What this layer holds, from the sizes of its tensors."""
        layout, report = self.layout, MemoryReport()
        parts = report.parts
        for pool in (self.pages, *self.chunks.values()):
            for part, size in pool.record.part_bytes().items():
                parts[part] += pool.used * size
            parts["spare"] += pool.data.nbytes - pool.used * pool.record.nbytes
        dense = self.dense_keys.nbytes + self.dense_values.nbytes
        parts["sinks"] = dense * self.sinks // (self.sinks + layout.tokens)
        parts["residual"] = dense - parts["sinks"]
        if self._packed is not None:
            parts["tables"] = self._packed.nbytes
        held = sum(t.nbytes for t in self.tensors())
        assert held == report.total, f"the parts come to {report.total} bytes, the tensors to {held}"

        token_elements = layout.kv_heads * (layout.key_dim + layout.value_dim)
        report.elements = token_elements * sum(self.lengths)
        page_elements = layout.kv_heads * layout.tokens
        report.packed_keys = self.pages.used * page_elements * layout.key_dim
        report.packed_values = self.pages.used * page_elements * layout.value_dim
        report.key_code_bits = report.packed_keys * self._code_bits(layout.key_bits)
        report.value_code_bits = report.packed_values * self._code_bits(layout.value_bits)
        for bits in self.chunks:
            report.key_code_bits += self._promoted(bits) * layout.tokens * (bits - self._code_bits(layout.key_bits))
        return report

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        held = [self.pages.data, *(pool.data for pool in self.chunks.values())]
        held += [self.dense_keys, self.dense_values]
        return held + (self._packed.tensors() if self._packed is not None else [])

    def _code_bits(self, bits: int) -> int:
        return 8 * self.layout.dense_dtype.itemsize if bits == DENSE_BITS else bits

    def _promoted(self, bits: int) -> int:
        """Channels of one promoted tier, over all pages in use."""
        live = [page for page, count in enumerate(self.pages.references) if count]
        last = self.pages.fields()[f"first_lane_{bits}"][live, -1]
        return int(last.sum(dtype=torch.int64)) if live else 0
