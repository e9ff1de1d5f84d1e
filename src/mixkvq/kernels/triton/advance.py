"""A decode step's books in one launch: which residuals are full, which page each is packed into, and who gets chunks.

:meth:`mixkvq.store.static.StaticStore.advance` and :meth:`~mixkvq.store.static.StaticStore.house` define what happens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixkvq.store.static import StaticStore


def advance(store: StaticStore, count: int) -> None:
    """As ``store.advance(count)``."""
    books, shape = store.books, store.shape
    with torch.cuda.device_of(books.lengths):
        _advance[(1,)](
            books.lengths,
            books.table,
            books.next_page,
            books.overflow,
            books.fresh,
            store.numbers,
            store.active,
            store.all_run_starts,
            store.per_page,
            count,
            shape.batch,
            books.pages,
            LAYERS=shape.layers,
            SINKS=shape.sinks,
            TOKENS=store.layout.tokens,
            WIDTHS=0 if shape.chunks_per_page is None else len(store.chunks),
            ROWS=triton.next_power_of_2(shape.batch),
            num_warps=1,
        )


def hand_out_chunks(store: StaticStore, bits: Tensor) -> None:
    """Runs of chunks for the active blocks, in ``store.run_starts``.

    Blocks that find no room are counted in ``store.homeless``, and lose the width in ``bits [layers * B, Hkv, D]``.
    In which order blocks are served is open.
    """
    layout = store.layout
    channels = layout.kv_heads * layout.key_dim
    for at, width in enumerate(layout.promoted_bits):
        with torch.cuda.device_of(bits):
            _hand_out[(len(bits),)](
                bits,
                store.active,
                store.next_chunk[at:],
                store.homeless,
                store.run_starts[width],
                len(store.chunks[width]),
                channels,
                WIDTH=width,
                LANES=layout.lanes(width),
                KEY_BITS=layout.key_bits,
                CHANNELS=triton.next_power_of_2(channels),
                num_warps=1,
            )


@triton.jit
def _advance(
    lengths,
    table,
    next_page,
    overflow,
    fresh,
    numbers,
    active,
    run_starts,
    per_page,
    count,
    batch,
    pages,
    LAYERS: tl.constexpr,
    SINKS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.arange(0, ROWS)
    on = row < batch
    length = tl.load(lengths + row, mask=on, other=0)
    before = tl.maximum(length - SINKS, 0) // TOKENS
    after = tl.maximum(length + count - SINKS, 0) // TOKENS
    full = on & (after > before)
    taken = tl.load(next_page)
    page = taken + tl.cumsum(full.to(tl.int32), 0) - 1
    fits = full & (page < pages)
    dropped = full & (page >= pages)
    tl.store(table + row * pages + before, page, mask=fits)
    tl.store(lengths + row, length + count, mask=on & (page < pages) | on & (after == before))
    tl.store(fresh + row, tl.where(fits, page, -1), mask=on)
    tl.store(next_page, taken + tl.sum(fits.to(tl.int32), 0))
    tl.store(overflow, tl.load(overflow) | tl.max(dropped.to(tl.int32), 0))
    for layer in range(LAYERS):
        at = layer * batch + row
        number = tl.where(fits, layer * pages + page, -1)
        tl.store(numbers + at, number, mask=on)
        tl.store(active + at, fits.to(tl.int32), mask=on)
        for width in tl.static_range(WIDTHS):
            first = tl.maximum(number, 0) * tl.load(per_page + width)
            tl.store(run_starts + width * LAYERS * batch + at, first, mask=on)


@triton.jit
def _hand_out(
    bits,
    active,
    next_chunk,
    homeless,
    run_starts,
    room,
    channels,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    KEY_BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    if tl.load(active + block) != 0:
        channel = tl.arange(0, CHANNELS)
        at = bits + block.to(tl.int64) * channels + channel
        chosen = tl.load(at, mask=channel < channels, other=0) == WIDTH
        count = (tl.sum(chosen.to(tl.int32), 0) + LANES - 1) // LANES
        first = tl.atomic_add(next_chunk, count)
        tl.store(run_starts + block, first)
        if first + count > room:
            tl.store(at, tl.full([CHANNELS], KEY_BITS, tl.uint8), mask=chosen)
            tl.atomic_add(homeless, 1)
