"""Attention over packed pages in torch operations: runs anywhere, keeps no dequantized copy.

A slice of pages at a time is unpacked, used and dropped. The base planes give every channel but the dense ones; a
promoted channel adds ``q_d * lane``, by a product over the chunks' lanes whose query operand is zero at the heads that
do not own the lane.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.kernels.partial import Partial, cap, finite
from mixkvq.kernels.reference import dequantize_keys
from mixkvq.kernels.unpack import base_keys, lane_keys, stored_values
from mixkvq.quant.rotation import rotate
from mixkvq.store.view import PackedPages, PageSlice

#: Numbers that one slice of pages may be unpacked to, to bound memory and stay near the caches.
MAX_UNPACKED = 1 << 21


def packed_attention(query: Tensor, pages: PackedPages, softcap: float | None = None) -> Partial:
    """Attention over all pages of every sequence.

    Args:
        query: ``[B, Hkv, rows, D]`` float32, scaled; not rotated.
        pages: the packed tokens; all of them are visible to every query of their sequence.
        softcap: see :func:`mixkvq.kernels.reference.attention`.

    Returns:
        The part; values are still rotated if they were stored so.
    """
    layout = pages.layout
    if layout.key_rotated and layout.key_rope is None:
        query = rotate(query)  # (H q) . (H k) = q . k
    per_page = layout.kv_heads * layout.tokens * max(layout.key_dim, layout.value_dim, query.shape[2])
    batch, kv_heads, rows, _ = query.shape
    top = query.new_full((batch, kv_heads, rows), float("-inf"))
    mass = query.new_zeros(batch, kv_heads, rows)
    total = query.new_zeros(batch, kv_heads, rows, layout.value_dim)
    for part in pages.slices(max(1, MAX_UNPACKED // per_page)):
        logits = cap(_logits(query[part.sequence], part), softcap)
        row = part.sequence.view(-1, 1, 1).expand(-1, kv_heads, rows)
        new_top = top.scatter_reduce(0, row, logits.amax(-1), "amax")
        safe_top = finite(new_top)
        weights = torch.exp(logits - safe_top[part.sequence].unsqueeze(-1))
        decay = torch.exp(top - safe_top)
        mass = (mass * decay).index_add_(0, part.sequence, weights.sum(-1))
        outputs = weights @ stored_values(part)
        total = (total * decay.unsqueeze(-1)).index_add_(0, part.sequence, outputs)
        top = new_top
    mass_or_tiny = mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return Partial(total / mass_or_tiny.unsqueeze(-1), top + mass.log())


def _logits(query: Tensor, pages: PageSlice) -> Tensor:
    """``[N, Hkv, rows, R]`` from each page's own ``query [N, Hkv, rows, D]``."""
    if pages.layout.key_rope is not None:  # turns every token by other angles: no rotation of the query stands for it
        return query @ dequantize_keys(pages).transpose(2, 3)
    logits = query @ base_keys(pages).transpose(2, 3)
    for bits, chunks in pages.chunks.items():
        channel = chunks.channel[:, None, None, :].expand(-1, *query.shape[1:3], -1)
        owned = chunks.head.transpose(1, 2).unsqueeze(2)
        lane_query = query.gather(3, channel) * owned
        logits += (lane_query.flatten(1, 2) @ lane_keys(pages, bits)).unflatten(1, query.shape[1:3])
    return logits
