"""Two ways to turn channel scores into tiers: absolute thresholds, and a budget."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mixkvq.config import PROMOTED_BITS

Scope = Literal["layer", "head"]


def promote_above(score: Tensor, base_bits: int, thresholds: dict[int, float]) -> Tensor:
    """Give a channel the widest tier whose threshold its score exceeds.

    Args:
        score: ``[N, Hkv, D]``.
        base_bits: width of channels above no threshold.
        thresholds: by width. A threshold above a wider tier's leaves its tier empty, as in the paper's Qwen-14B.

    Returns:
        ``[N, Hkv, D]`` uint8.
    """
    bits = torch.full_like(score, base_bits, dtype=torch.uint8)
    for width in sorted(thresholds):
        bits = bits.masked_fill(score > thresholds[width], width)
    return bits


def promote_top(score: Tensor, base_bits: int, budget: float, scope: Scope) -> Tensor:
    """Give the channels with the highest scores 4 bits, as many as a mean of ``budget`` bits allows.

    Args:
        score: ``[N, Hkv, D]``.
        scope: "layer" ranks all channels of a block together, "head" those of each KV head.

    Returns:
        ``[N, Hkv, D]`` uint8, with :func:`promoted_count` promoted channels in every block.
    """
    ranked = score.flatten(1) if scope == "layer" else score
    top = ranked.topk(_affordable(ranked.shape[-1], base_bits, budget), dim=-1).indices
    bits = torch.full_like(ranked, base_bits, dtype=torch.uint8).scatter(-1, top, PROMOTED_BITS)
    return bits.view_as(score)


def promoted_count(kv_heads: int, head_dim: int, base_bits: int, budget: float, scope: Scope) -> int:
    """How many channels of a block, all heads together, :func:`promote_top` promotes."""
    if scope == "layer":
        return _affordable(kv_heads * head_dim, base_bits, budget)
    return kv_heads * _affordable(head_dim, base_bits, budget)


def _affordable(channels: int, base_bits: int, budget: float) -> int:
    # A hair above, so that a budget written in decimals is not a channel short of what it says.
    return int((budget - base_bits) / (PROMOTED_BITS - base_bits) * channels + 1e-6)
