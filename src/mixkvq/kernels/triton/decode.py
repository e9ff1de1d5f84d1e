"""Attention of a few new tokens over a packed cache, in one launch.

The context is split: program ``(split, head, sequence)`` attends to an even share of the sequence's pages, and split 0
to what is not quantized, which are sinks, residual and the new tokens. Each leaves a partial result in scratch tensors,
and the last of a head to finish merges them, rotates packed values back and writes the output. A program works on at
most 16 rows, which are (query head of the group, new token) pairs; more rows make more programs.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from mixkvq.kernels.device import multiprocessors
from mixkvq.kernels.tickets import tickets
from mixkvq.kernels.triton.decode_kernel import decode_kernel
from mixkvq.kernels.triton.read_format import read_format
from mixkvq.quant.salience import QueryStatistics
from mixkvq.store.tensors import CacheTensors

#: Programs of one warp for every multiprocessor: latency is hidden by having many.
PROGRAMS_PER_MULTIPROCESSOR = 8
#: Splits up to which the last program merges them all.
MERGED_AT_ONCE = 16
#: Shortest side of an operand that a matrix product sums over.
MIN_DOT = 16


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
    """See :func:`mixkvq.kernels.decode.decode_attention`.

    Products of 16-bit queries are in bfloat16, of float32 queries in float32. Calls on one device must be ordered, and
    the first one outside of any graph: see :mod:`mixkvq.kernels.tickets`.
    """
    batch, heads, length, key_dim = query.shape
    layout = cache.layout
    group = heads // layout.kv_heads
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))

    rows = 8 if group * length <= 8 else 16
    row_tiles = triton.cdiv(group * length, rows)
    groups = layout.kv_heads * row_tiles
    splits = _splits(batch * groups, cache.table.shape[1], multiprocessors(query.device))
    team = 1 if splits <= MERGED_AT_ONCE else math.isqrt(splits)
    places = batch * groups * (1 + splits)
    output = torch.empty(batch, heads, length, layout.value_dim, dtype=query.dtype, device=query.device)
    states = torch.empty(places, 2, rows, dtype=torch.float32, device=query.device)
    sums = torch.empty(places, rows, layout.value_dim, dtype=torch.float32, device=query.device)
    seen = (statistics.total, statistics.count, statistics.samples) if statistics is not None else (None, None, None)
    rotated = layout.value_dim & -layout.value_dim if cache.rotated else 1

    with torch.cuda.device_of(query):
        decode_kernel[(1 + splits, groups, batch)](
            query,
            keys,
            values,
            output,
            cache.pages,
            # Triton has no empty tuples.
            tuple(cache.chunks[bits] for bits in layout.promoted_bits) or (cache.pages,),
            cache.table,
            cache.lengths,
            cache.dense_keys,
            cache.dense_values,
            sinks,
            states,
            sums,
            tickets(query.device, batch * groups * (1 + triton.cdiv(splits, team))),
            *seen,
            scaling,
            softcap if softcap is not None else 1.0,
            query.stride()[:3],
            keys.stride()[:3],
            values.stride()[:3],
            cache.dense_keys.stride()[:3],
            cache.dense_values.stride()[:3],
            cache.table.stride(0),
            length,
            group,
            row_tiles,
            team,
            F=read_format(layout),
            ROWS=rows,
            KEY_CHANNELS=_padded(key_dim),
            VALUE_CHANNELS=_padded(layout.value_dim),
            GROUP_CHANNELS=_padded(layout.value_dim // layout.value_groups),
            SINK_TOKENS=cache.sinks,
            SOFTCAP=softcap is not None,
            ROTATED=rotated,
            APPEND=append,
            num_warps=1,
            # Pages without tiers are one loop, and pipelined whole, which takes shared memory.
            num_stages=3 if layout.promoted_bits else 2,
        )
    return output


def _splits(tasks: int, blocks: int, multiprocessors: int) -> int:
    """Programs that share a task's pages, of a cache with room for so many blocks a sequence.

    Lengths are not known here: they live on the device.
    """
    return min(blocks, max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // tasks - 1))


def _padded(channels: int) -> int:
    return max(MIN_DOT, triton.next_power_of_2(channels))
