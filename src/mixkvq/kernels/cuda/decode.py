"""The CUDA decode kernel: what it supports, and how a layer's tensors become its arguments."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from mixkvq.kernels.cuda.module import NO_BINDINGS, LaunchableKernel, address, has_bindings, load_kernel, refusal
from mixkvq.kernels.device import multiprocessors
from mixkvq.kernels.tickets import tickets
from mixkvq.quant.block import DENSE_BITS
from mixkvq.quant.salience import KEPT_SAMPLES, SAMPLED_EVERY, QueryStatistics
from mixkvq.store.layout import PageLayout
from mixkvq.store.tensors import CacheTensors

#: Warps of a block; each handles a page at a time.
WARPS = 4
#: Query rows of one tile of the matrix product: 8 columns, two digits a row.
TILE_ROWS = 4
#: Pages that a warp gets at most before more blocks are started than the device has room for at once.
PAGES_PER_WARP = 4
#: Parts of a sequence, the dense one included.
MAX_PARTS = 256
#: Tokens of a page.
TOKENS = 128
#: Widths of keys and of values.
WIDTHS = (2, 3, 4, 8)
#: Chunks of low bits that a warp copies ahead; a head with more has the others copied at its turn.
STAGED_CHUNKS = 4


class Arguments(ctypes.Structure):
    """``struct Arguments`` of ``decode.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "query", "new_keys", "new_values", "output", "pages", "chunks4", "chunks16", "table", "lengths",
            "dense_keys", "dense_values", "model_sinks", "total", "count", "samples",
            "part_sums", "part_stats", "tickets",
        )),
        ("query_strides", ctypes.c_longlong * 3),
        ("key_strides", ctypes.c_longlong * 3),
        ("value_strides", ctypes.c_longlong * 3),
        ("dense_strides", ctypes.c_longlong * 2),
        ("table_stride", ctypes.c_int),
        ("group", ctypes.c_int),
        ("length", ctypes.c_int),
        ("append", ctypes.c_int),
        ("pages_per_warp", ctypes.c_int),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]  # fmt: skip


def unsupported(query: Tensor, tensors: CacheTensors) -> str | None:
    """Why the kernel cannot serve a step, or None if it can."""
    if not has_bindings():
        return NO_BINDINGS
    return _unsupported(tensors.layout, tensors.sinks, query.dtype, query.device, _row_tiles(query, tensors.layout))


@lru_cache(maxsize=64)
def _unsupported(
    layout: PageLayout, sinks: int, dtype: torch.dtype, device: torch.device, row_tiles: int
) -> str | None:
    return unsupported_format(layout, dtype) or refusal(device, shared_bytes(layout, sinks, row_tiles))


def unsupported_format(layout: PageLayout, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot read such pages for queries of a type, or None if it can."""
    checks = (
        (layout.key_dim != layout.value_dim, "keys and values of different dimensions"),
        (layout.key_dim not in (64, 96, 128, 256), f"head dimension {layout.key_dim}"),
        (layout.tokens != TOKENS, f"pages of {layout.tokens} tokens"),
        (
            not {layout.key_bits, layout.value_bits} <= {*WIDTHS},
            f"widths other than {', '.join(map(str, WIDTHS))} bits",
        ),
        (layout.key_group not in (32, 64, 128), f"key groups of {layout.key_group} tokens"),
        (layout.key_dim // 16 % layout.value_groups != 0, f"{layout.value_groups} value groups"),
        (layout.key_bits > 2 and bool(layout.promoted_bits), f"channels promoted above {layout.key_bits} bits"),
        (not set(layout.promoted_bits) <= {4, DENSE_BITS}, f"channels promoted to {layout.promoted_bits} bits"),
        (layout.param_dtype != torch.float16, f"scales in {layout.param_dtype}"),
        (dtype not in (torch.bfloat16, torch.float16), f"queries in {dtype}"),
        (dtype != layout.dense_dtype, f"queries in {dtype} and a cache in {layout.dense_dtype}"),
    )
    return next((reason for fails, reason in checks if fails), None)


def shared_bytes(layout: PageLayout, sinks: int, row_tiles: int) -> int:
    """``sizeof(Memory)`` of ``common.cuh``, known before anything is compiled."""
    rows, dim, groups = TILE_ROWS * row_tiles, layout.key_dim, layout.tokens // layout.key_group
    low_bits = layout.chunks.get(4)
    params = 2 * (2 * groups * dim + (1 if layout.value_symmetric else 2) * layout.value_groups * TOKENS)
    planes = layout.value_bits * dim * 16
    chunks = STAGED_CHUNKS * low_bits.nbytes if low_bits else 2 * 16
    products = groups * rows * (dim + 8) if low_bits else dim + 8
    warp = params + planes + chunks + 4 * max(products, rows * (TOKENS + 24))
    packed = max(WARPS * _aligned(warp), 4 * WARPS * rows * (dim + 2))
    slices = max(32 * WARPS // (dim // 2), 1)
    dense = 4 * rows * (sinks + TOKENS + 16 + slices * dim)
    merge = 4 * (rows * MAX_PARTS + rows + 1)
    return 4 * rows * dim + _aligned(max(packed, dense, merge))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cache: CacheTensors,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    append: bool = False,
    statistics: QueryStatistics | None = None,
) -> Tensor:
    """See :func:`mixkvq.kernels.decode.decode_attention`; for what :func:`unsupported` lets pass."""
    batch, heads, length, dim = query.shape
    kv_heads = cache.layout.kv_heads
    # New tokens are rounded to the type in which they will be stored.
    query, keys, values = (_vectors(x.to(cache.layout.dense_dtype)) for x in (query, keys, values))
    row_tiles = _row_tiles(query, cache.layout)
    kernel = _kernel(cache, query.dtype, softcap is not None, row_tiles)
    rows = TILE_ROWS * row_tiles
    heads_grid = kv_heads * -(-heads // kv_heads * length // rows)
    shares, pages_per_warp = _shares(kernel, cache, batch * heads_grid)
    parts = shares + 1
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = torch.empty(batch * heads_grid * parts * rows * dim, dtype=torch.float32, device=query.device)
    stats = torch.empty(batch * heads_grid * parts * rows * 2, dtype=torch.float32, device=query.device)
    sinks = sinks if sinks is None else sinks.float().contiguous()
    seen = (statistics.total, statistics.count, statistics.samples) if statistics is not None else (None, None, None)
    arguments = Arguments(
        *(address(x) for x in (
            query, keys, values, output, cache.pages, cache.chunks.get(4), cache.chunks.get(DENSE_BITS), cache.table,
            cache.lengths, cache.dense_keys, cache.dense_values, sinks, *seen, sums, stats,
            tickets(query.device, batch * heads_grid),
        )),
        query.stride()[:3],
        keys.stride()[:3],
        values.stride()[:3],
        cache.dense_keys.stride()[:2],
        cache.table.stride(0),
        heads // kv_heads,
        length,
        append,
        pages_per_warp,
        scaling,
        softcap or 0.0,
    )  # fmt: skip
    with torch.cuda.device_of(query):
        kernel.launch((heads_grid, batch, parts), 32 * WARPS, arguments)
    return output


def _vectors(x: Tensor) -> Tensor:
    """``x``, or a copy whose vectors the kernel can load 16 bytes at a time."""
    aligned = x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    # Not `contiguous`, which leaves a tensor that begins between two vectors where it is.
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _row_tiles(query: Tensor, layout: PageLayout) -> int:
    """Tiles of query rows that a block handles: one suffices where a KV head has no more rows."""
    return 2 if query.shape[1] // layout.kv_heads * query.shape[2] > TILE_ROWS else 1


def _kernel(cache: CacheTensors, dtype: torch.dtype, softcap: bool, row_tiles: int) -> LaunchableKernel:
    macros = kernel_macros(cache.layout, cache.sinks, cache.rotated, dtype, softcap, row_tiles)
    return load_kernel("decode.cu", "decode", macros, cache.pages.device.index or 0)


def resident_blocks(layout: PageLayout, row_tiles: int) -> int:
    """Blocks that the compiler leaves a multiprocessor room for: as many as run without spilling registers."""
    wide = layout.key_bits > 2 or layout.value_bits == 8 or layout.key_dim > 128
    if wide or row_tiles > 1 or DENSE_BITS in layout.promoted_bits:
        return 2
    return 4 if layout.key_group == layout.tokens else 3


@lru_cache(maxsize=64)
def kernel_macros(
    layout: PageLayout, sinks: int, rotated: bool, dtype: torch.dtype, softcap: bool, row_tiles: int
) -> tuple[tuple[str, int], ...]:
    """The kernel's constants for a page format."""
    page = layout.page.offsets
    macros = {
        "KV_HEADS": layout.kv_heads,
        "HEAD_DIM": layout.key_dim,
        "KEY_BITS": layout.key_bits,
        "KEY_GROUPS": layout.tokens // layout.key_group,
        "VALUE_BITS": layout.value_bits,
        "VALUE_GROUPS": layout.value_groups,
        "VALUE_SYMMETRIC": layout.value_symmetric,
        "PAGE_BYTES": layout.page.nbytes,
        "SINKS": sinks,
        "ROTATED": rotated,
        "SOFTCAP": softcap,
        "BFLOAT16": dtype == torch.bfloat16,
        "ROW_TILES": row_tiles,
        "WARPS": WARPS,
        "TOKENS": TOKENS,
        "STAGED_CHUNKS": STAGED_CHUNKS,
        "MAX_PARTS": MAX_PARTS,
        "KEPT_SAMPLES": KEPT_SAMPLES,
        "SAMPLED_EVERY": SAMPLED_EVERY,
        "BLOCKS_PER_MULTIPROCESSOR": resident_blocks(layout, row_tiles),
    }
    for kind in ("key", "value"):
        for field in ("plane_0", "plane_1", "plane_2", "plane_3", "scale", "zero"):
            macros[f"{kind}_{field}".upper()] = page.get(f"{kind}_{field}", 0)
    for bits, field in ((4, "plane_0"), (DENSE_BITS, "keys")):
        chunk = layout.chunks.get(bits)
        macros[f"LANES{bits}"] = chunk is not None
        macros[f"RUN_{bits}"] = page.get(f"run_{bits}", 0)
        macros[f"FIRST_LANE_{bits}"] = page.get(f"first_lane_{bits}", 0)
        macros[f"CHUNK{bits}_BYTES"] = chunk.nbytes if chunk else 0
        macros[f"CHUNK{bits}_CHANNEL"] = chunk.offsets["channel"] if chunk else 0
        macros[f"CHUNK{bits}_{field.partition('_')[0].upper()}"] = chunk.offsets[field] if chunk else 0
    return tuple((name, int(value)) for name, value in macros.items())


def _shares(kernel: LaunchableKernel, cache: CacheTensors, heads: int) -> tuple[int, int]:
    """Into how many shares the pages of each of ``heads`` are cut at most, and how many pages a warp gets at least.

    From what the cache could hold: its lengths are on the device. Where there are few pages, they are spread over the
    whole device; where there are many, small shares keep the gap at the end small.
    """
    slots = multiprocessors(cache.pages.device) * kernel.resident_blocks(32 * WARPS)
    pages = min(cache.table.shape[1], -(-cache.pages.shape[0] // cache.table.shape[0]))
    pages_per_warp = min(max(round(pages * heads / (WARPS * slots)), 1), PAGES_PER_WARP)
    return max(1, min(-(-pages // (WARPS * pages_per_warp)), MAX_PARTS - 1)), pages_per_warp
