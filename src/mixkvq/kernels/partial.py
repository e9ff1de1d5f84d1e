"""Attention in parts: softmax over a subset of the tokens, and how parts are merged.

A part is the normalized output over its tokens and the log of its softmax denominator. Merging by log-sum-exp gives
exactly the attention over the union (as in FlashDecoding).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Logits that one step of a long query may hold, to bound memory.
MAX_LOGITS = 1 << 25


class Partial(NamedTuple):
    """``output [B, Hkv, rows, D]`` and ``lse [B, Hkv, rows]`` in float32; rows are (query head of the group, token).

    A row that sees no token has ``lse = -inf`` and output 0.
    """

    output: Tensor
    lse: Tensor


def dense_attention(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, softcap: float | None
) -> Partial:
    """Attention over unquantized tokens.

    Args:
        query: ``[B, Hkv, n, L, D]`` float32, scaled, the query heads of each KV head's group apart.
        keys, values: ``[B, Hkv, T, D]``.
        visible: bool, broadcastable to ``[B, 1, 1, L, T]``, or None if every query sees every token.
        softcap: see :func:`mixkvq.kernels.reference.attention`.

    Returns:
        The part, with rows ``n * L``.
    """
    batch, kv_heads, group, length, _ = query.shape
    keys, values = keys.float(), values.float()
    step = max(1, MAX_LOGITS // max(1, batch * kv_heads * group * keys.shape[2]))
    parts = []
    for start in range(0, length, step):
        part = query[:, :, :, start : start + step]
        seen = visible
        if visible is not None and visible.shape[-2] > 1:
            seen = visible[..., start : start + step, :]
        logits = (part.flatten(2, 3) @ keys.transpose(2, 3)).unflatten(2, (group, -1))
        logits = cap(logits, softcap)
        if seen is not None:
            logits = logits.masked_fill(~seen, float("-inf"))
        top = finite(logits.amax(-1, keepdim=True))
        weights = torch.exp(logits - top)
        mass = weights.sum(-1, keepdim=True)
        output = (weights.flatten(2, 3) @ values).unflatten(2, (group, -1))
        parts.append((output / mass.clamp(min=torch.finfo(mass.dtype).tiny), (top + mass.log()).squeeze(-1)))
    output = torch.cat([output for output, _ in parts], 3).flatten(2, 3)
    lse = torch.cat([lse for _, lse in parts], 3).flatten(2, 3)
    return Partial(output, lse)


def merge(parts: list[Partial], sinks: Tensor | None = None) -> Tensor:
    """The attention output ``[B, Hkv, rows, D]`` over all parts together.

    Args:
        sinks: ``[Hkv, rows]`` logits that take part in the denominator only (GPT-OSS), or None.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0].output
    lse = torch.stack([part.lse for part in parts])
    top = lse.amax(0) if sinks is None else torch.maximum(lse.amax(0), sinks)
    weights = torch.exp(lse - finite(top))
    mass = weights.sum(0)
    if sinks is not None:
        mass = mass + torch.exp(sinks - finite(top))
    outputs = torch.stack([part.output for part in parts])
    total = (weights.unsqueeze(-1) * outputs).sum(0)
    return total / mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(-1)


def sink_rows(sinks: Tensor | None, kv_heads: int, length: int) -> Tensor | None:
    """Sink logits by query head, ``[Hq]``, as :func:`merge` takes them: ``[Hkv, rows]``."""
    if sinks is None:
        return None
    return sinks.float().view(kv_heads, -1, 1).expand(-1, -1, length).flatten(1)


def causal(length: int, total: int, device: torch.device) -> Tensor:
    """Which of ``total`` tokens the last ``length`` of them see: ``[length, total]`` bool."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft-capped logits; unchanged for None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def finite(top: Tensor) -> Tensor:
    """A row maximum that is safe to subtract: 0 where the row sees nothing."""
    return torch.where(top == float("-inf"), 0.0, top)
