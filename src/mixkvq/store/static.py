"""All quantized layers of a model in tensors that are allocated once: no address ever changes, no book is on the host.

That is what a CUDA graph asks for. The price is a fixed capacity: P pages that the sequences of a batch share.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from mixkvq.quant.salience import QueryStatistics
from mixkvq.store.books import Books
from mixkvq.store.memory import MemoryReport, packed_report
from mixkvq.store.packing import chunk_counts
from mixkvq.store.shape import MARGIN, OVERHANG, PROMOTED_SHARE, Capacity, StaticShape
from mixkvq.store.tensors import CacheTensors


class StaticStore:
    """Pages, chunks, sinks, residuals, statistics and books of all layers.

    Args:
        shape: what is stored.
        pages: P, pages of each layer.
        chunks: by promoted width, chunks of all layers together; None to grow them until :meth:`settle` is called.
        device: where everything is held.

    Attributes:
        pages: ``[layers, P, nbytes]`` uint8.
        chunks: by promoted width, ``[C, nbytes]`` uint8; runs of all layers count from the start.
        dense_keys, dense_values: ``[layers, B, Hkv, sinks + R + 8, D]``.
        all_statistics: query statistics with ``layers * B`` rows, as :attr:`numbers` counts them, or None.
        books: lengths and block table, which all layers share.
        numbers, active: ``[layers * B]`` int32: the record in ``pages`` that each layer's residual of each sequence is
            to be packed into now, -1 for none; and 1 where there is one.
        run_starts: by promoted width, ``[layers * B]`` int32: the chunks to go with it.
        next_chunk: ``[widths]`` int32, chunks below are taken; used where data decides.
        homeless: ``[1]`` int32: runs of chunks for which there was no room.
    """

    def __init__(self, shape: StaticShape, pages: int, chunks: dict[int, int] | None, device: torch.device) -> None:
        layout, layers, batch = shape.layout, shape.layers, shape.batch
        self.shape, self.layout = shape, layout
        self.settled = chunks is not None
        self.pages = torch.empty(layers, pages, layout.page.nbytes, dtype=torch.uint8, device=device)
        self.chunks = {
            bits: torch.empty(chunks[bits] if chunks else 0, record.nbytes, dtype=torch.uint8, device=device)
            for bits, record in layout.chunks.items()
        }
        slots = shape.sinks + layout.tokens + OVERHANG
        dense = layers, batch, layout.kv_heads, slots
        self.dense_keys = torch.zeros(*dense, layout.key_dim, dtype=layout.dense_dtype, device=device)
        self.dense_values = torch.zeros(*dense, layout.value_dim, dtype=layout.dense_dtype, device=device)
        self.all_statistics: QueryStatistics | None = None
        if shape.statistics:
            heads = layout.kv_heads, layout.key_dim
            self.all_statistics = QueryStatistics(layers * batch, *heads, device, sample_dtype=shape.sample_dtype)
        self.books = Books(batch, pages, shape.sinks, layout.tokens, device)
        self._make_orders(device)
        self._tensors: dict[int, CacheTensors] = {}

    def _make_orders(self, device: torch.device) -> None:
        count, widths = self.shape.layers * self.shape.batch, self.layout.promoted_bits
        numbers: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.numbers, self.active = torch.zeros(count, **numbers), torch.zeros(count, **numbers)
        self.rows = torch.arange(count, **numbers)
        self.starts = torch.full((count,), self.shape.sinks, **numbers)
        self.all_run_starts = torch.zeros(len(widths), count, **numbers)
        self.run_starts = dict(zip(widths, self.all_run_starts, strict=True))
        fixed = self.shape.chunks_per_page or {}
        self.per_page = torch.tensor([fixed.get(bits, 0) for bits in widths], **numbers)
        self.next_chunk, self.homeless = torch.zeros(len(widths), **numbers), torch.zeros(1, **numbers)

    @property
    def slots(self) -> int:
        """Dense slots of a sequence."""
        return self.dense_keys.shape[3]

    @property
    def all_pages(self) -> Tensor:
        """The pages of all layers, one layer's after the other's: ``[layers * P, nbytes]``."""
        return self.pages.flatten(0, 1)

    @property
    def all_dense(self) -> tuple[Tensor, Tensor]:
        """Dense keys and values of all layers, ``[layers * B, Hkv, slots, D]``, as :attr:`numbers` counts them."""
        return self.dense_keys.flatten(0, 1), self.dense_values.flatten(0, 1)

    def tensors(self, layer: int) -> CacheTensors:
        """One layer as kernels read it."""
        if layer not in self._tensors:
            self._tensors[layer] = CacheTensors(
                layout=self.layout,
                sinks=self.shape.sinks,
                rotated=self.shape.rotated,
                pages=self.pages[layer],
                chunks=self.chunks,
                table=self.books.table,
                lengths=self.books.lengths,
                dense_keys=self.dense_keys[layer],
                dense_values=self.dense_values[layer],
            )
        return self._tensors[layer]

    def statistics(self, layer: int) -> QueryStatistics | None:
        """One layer's query statistics, of B rows, or None. They share memory with those of all layers."""
        if self.all_statistics is None:
            return None
        start = layer * self.shape.batch
        return self.all_statistics.part(start, start + self.shape.batch)

    def reset(self) -> None:
        """Forget all tokens, in place."""
        self.books.reset()
        # The dense slots too: a masked slot must be finite, and what was there may be anything.
        dense = self.dense_keys, self.dense_values
        for tensor in (*dense, *self._kept_of_queries(), self.next_chunk, self.homeless):
            tensor.zero_()

    # A step's tokens are in the residual

    def advance(self, count: int) -> None:
        """Take ``count`` new tokens of every sequence into the books, and say which residuals are to be packed where.

        Does not wait for the device. The twin of :func:`mixkvq.kernels.triton.advance.advance`.
        """
        self.books.advance(count)
        first = torch.arange(self.shape.layers, device=self.pages.device)[:, None] * self.books.pages
        fresh = self.books.fresh
        self.numbers.copy_(torch.where(fresh >= 0, first + fresh, -1).flatten())
        self.active.copy_(self.numbers >= 0)
        if self.shape.chunks_per_page is not None:
            torch.mul(self.per_page[:, None], self.numbers.clamp(min=0), out=self.all_run_starts)

    def first_tokens(self) -> Tensor:
        """After :meth:`advance`, the number in its sequence of the first token of each residual that is to be packed:
        ``[layers * B]`` int64, as :attr:`numbers` counts them.
        """
        blocks, _ = self.tensors(0).places()
        first = self.shape.sinks + (blocks.long() - 1) * self.layout.tokens
        return first.repeat(self.shape.layers)

    def shift(self) -> None:
        """Move what lies behind the blocks just packed to the front of the residual."""
        sinks, behind = self.shape.sinks, self.shape.sinks + self.layout.tokens
        packed = (self.books.fresh >= 0).view(1, -1, 1, 1, 1)
        for dense in (self.dense_keys, self.dense_values):
            front = dense[:, :, :, sinks : sinks + OVERHANG]
            front.copy_(torch.where(packed, dense[:, :, :, behind:], front))

    # Chunks are handed out

    def house(self, bits: Tensor, numbers: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Runs of chunks for N blocks with planned ``bits [N, Hkv, D]``, to be packed into pages ``numbers [N]``.

        Waits for the device where data decides how many there are. Channels that find no room keep their base width.

        Returns:
            The bits that there is room for, and first chunks ``[N]`` int32 by promoted width.
        """
        if self.shape.chunks_per_page is not None:
            starts = {width: (numbers * chunks).int() for width, chunks in self.shape.chunks_per_page.items()}
            return bits, starts
        starts = {}
        for at, (width, taken) in enumerate(zip(self.layout.promoted_bits, self.next_chunk.tolist(), strict=True)):
            begins, lost = [], []
            counts = chunk_counts(self.layout, width, bits).tolist()
            if not self.settled and taken + sum(counts) > len(self.chunks[width]):
                self._resize(width, taken + sum(counts))
            for block, count in enumerate(counts):
                if taken + count > len(self.chunks[width]):
                    lost.append(block)
                    count = 0
                begins.append(taken)
                taken += count
            if lost:
                bits = bits.clone()
                bits[lost] = bits[lost].masked_fill(bits[lost] == width, self.layout.key_bits)
                self.homeless += len(lost)
            self.next_chunk[at] = taken
            starts[width] = torch.tensor(begins, dtype=torch.int32).to(bits.device)
        return bits, starts

    def _resize(self, width: int, count: int) -> None:
        """Give a width room for so many chunks, in a new tensor."""
        old = self.chunks[width]
        new = old.new_empty(count, old.shape[1])
        kept = min(count, len(old))
        new[:kept] = old[:kept]
        self.chunks = {**self.chunks, width: new}
        self._tensors.clear()

    def settle(self) -> None:
        """Allocate chunks for all pages, by what those of the first prompt needed: from now on no tensor moves."""
        if self.settled:
            return
        written = self.shape.layers * int(self.books.next_page)
        default = self.shape.chunk_room(self.books.pages, dict.fromkeys(self.chunks, PROMOTED_SHARE))
        for width, taken in zip(self.layout.promoted_bits, self.next_chunk.tolist(), strict=True):
            needed = taken * self.shape.layers * self.books.pages / max(written, 1)
            self._resize(width, math.ceil(MARGIN * needed) + self.shape.layers if written else default[width])
        self.settled = True  # last: there may not be room for the chunks

    def warn(self) -> None:
        """Warn if promoted channels found no room. Waits for the device."""
        count = int(self.homeless)
        if count:
            warnings.warn(
                f"{count} times the promoted channels of a page found no chunks left and were stored at "
                f"{self.layout.key_bits} bits: pages need more than was made room for. Give the cache a promoted_share "
                "(share of key channels per promoted width) that is larger, or a budget instead of thresholds.",
                stacklevel=2,
            )

    # Bytes are counted

    def held(self) -> list[Tensor]:
        """Every tensor that is held."""
        own = [self.pages, *self.chunks.values(), self.dense_keys, self.dense_values]
        return [*own, *self._kept_of_queries(), *self._tables()]

    def _kept_of_queries(self) -> list[Tensor]:
        return self.all_statistics.tensors() if self.all_statistics is not None else []

    def _tables(self) -> list[Tensor]:
        orders = [self.numbers, self.active, self.rows, self.starts, self.all_run_starts, self.per_page]
        return [*self.books.tensors(), *orders, self.next_chunk, self.homeless]

    def memory(self) -> MemoryReport:
        """What is held, from the sizes of the tensors; room that no page uses yet is "spare". Waits for the device."""
        self.warn()
        layout, layers = self.layout, self.shape.layers
        used = int(self.books.next_page)
        fields = layout.page.views(self.all_pages)
        lanes = {
            bits: fields[f"first_lane_{bits}"].unflatten(0, (layers, -1))[:, :used, -1].sum(dtype=torch.int64)
            for bits in layout.promoted_bits
        }
        report = packed_report(layout, layers * used, {bits: int(count) for bits, count in lanes.items()})
        parts, chunks_per_page = report.parts, self.shape.chunks_per_page
        taken = dict(zip(layout.promoted_bits, self.next_chunk.tolist(), strict=True))
        if chunks_per_page is not None:
            taken = {bits: layers * used * count for bits, count in chunks_per_page.items()}
        pools = [(layout.page, self.all_pages, layers * used)]
        pools += [(layout.chunks[bits], data, min(taken[bits], len(data))) for bits, data in self.chunks.items()]
        for record, data, count in pools:
            for part, size in record.part_bytes().items():
                parts[part] += count * size
            parts["spare"] += data.nbytes - count * record.nbytes
        dense = self.dense_keys.nbytes + self.dense_values.nbytes
        parts["sinks"] = dense * self.shape.sinks // self.slots
        parts["residual"] = dense - parts["sinks"]
        parts["statistics"] = sum(tensor.nbytes for tensor in self._kept_of_queries())
        parts["tables"] = sum(tensor.nbytes for tensor in self._tables())
        report.elements = layers * layout.token_elements * int(self.books.lengths.sum())
        report.check(self.held())
        return report


def new_store(shape: StaticShape, capacity: Capacity, device: torch.device) -> StaticStore:
    """A store of the given capacity.

    Raises:
        ValueError: ``max_bytes`` does not even hold a page for every sequence.
    """
    given = capacity.promoted_share
    shares = dict.fromkeys(shape.layout.promoted_bits, PROMOTED_SHARE if given is None else given)
    if capacity.max_bytes is not None:
        pages = _pages_in(shape, capacity.max_bytes, shares)
    else:
        assert capacity.max_tokens is not None
        pages = max(capacity.max_tokens // shape.layout.tokens, shape.batch)
    known = shape.chunks_per_page is not None or given is not None or capacity.max_bytes is not None
    return StaticStore(shape, pages, shape.chunk_room(pages, shares) if known else None, device)


def _pages_in(shape: StaticShape, nbytes: int, shares: dict[int, float]) -> int:
    """The pages that fit into so many bytes, everything counted."""

    def size(pages: int) -> int:
        store = StaticStore(shape, pages, shape.chunk_room(pages, shares), torch.device("meta"))
        return sum(tensor.nbytes for tensor in store.held())

    if size(shape.batch) > nbytes:
        raise ValueError(
            f"max_bytes={nbytes:,} is too small: sinks, residual and one page for each of {shape.batch} sequences "
            f"take {size(shape.batch):,} bytes. Raise max_bytes, or use a smaller residual_length."
        )
    low, high = shape.batch, nbytes // (shape.layers * shape.layout.page.nbytes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= nbytes else (low, middle - 1)
    return low
