"""The definition, in plain torch: slow and obvious. Every faster path is compared with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixkvq.kernels.unpack import base_keys, lane_keys, stored_values
from mixkvq.quant.rotation import rotate
from mixkvq.store.view import PackedPages, PageSlice


def dequantize_keys(pages: PageSlice) -> Tensor:
    """Keys of N pages: ``[N, Hkv, R, D]`` float32."""
    keys = base_keys(pages)
    for bits, chunks in pages.chunks.items():
        page, lane, head = chunks.head.nonzero(as_tuple=True)
        keys[page, head, :, chunks.channel[page, lane]] += lane_keys(pages, bits)[page, lane]
    if pages.layout.key_rotated:
        keys = rotate(keys)
    rope = pages.layout.key_rope
    return keys if rope is None else rope.apply(keys, pages.first)


def dequantize_pages(pages: PackedPages, row: int, *, rotated: bool) -> tuple[Tensor, Tensor]:
    """The packed tokens of one sequence: keys and values ``[Hkv, T, D]`` float32.

    Args:
        rotated: whether values were rotated before they were stored, and are to be rotated back.
    """
    parts = [part for part in pages.slices(1) if part.sequence.item() == row]
    keys = torch.cat([dequantize_keys(part)[0] for part in parts], 1)
    values = torch.cat([stored_values(part)[0] for part in parts], 1)
    return keys, rotate(values) if rotated else values


def attention(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, **options: Any) -> Tensor:
    """Softmax attention of one sequence, in float32.

    Args:
        query, keys, visible: see :func:`attention_weights`, as for ``options``.
        values: ``[Hkv, T, D]``.

    Returns:
        ``[Hq, L, D]``.
    """
    group = query.shape[0] // keys.shape[0]
    return attention_weights(query, keys, visible, **options) @ values.float().repeat_interleave(group, dim=0)


def attention_weights(
    query: Tensor,
    keys: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What each query of one sequence gives to each token, in float32.

    Args:
        query: ``[Hq, L, D]``.
        keys: ``[Hkv, T, D]``; query head ``h`` reads KV head ``h // (Hq / Hkv)``.
        visible: ``[L, T]`` bool.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: ``[Hq]``, a logit per head that takes part in the softmax but has no value (GPT-OSS).

    Returns:
        ``[Hq, L, T]``; what is left to 1 in a row is the sink's.
    """
    keys = keys.float().repeat_interleave(query.shape[0] // keys.shape[0], dim=0)
    logits = query.float() @ keys.transpose(1, 2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, logits.shape[1], 1)
        return torch.cat([logits, column], 2).softmax(2)[:, :, :-1]
    return logits.softmax(2)
