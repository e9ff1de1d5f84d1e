"""Two ways to turn channel scores into tiers: absolute thresholds, and a budget."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


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


def promote_top(
    score: Tensor, base_bits: int, width: int, budget: float, scope: Literal["layer", "head"]
) -> Tensor:
    """Give the channels with the highest scores ``width`` bits, as many as a mean of ``budget`` bits allows.

    Args:
        score: ``[N, Hkv, D]``.
        scope: "layer" ranks all channels of a block together, "head" those of each KV head.

    Returns:
        ``[N, Hkv, D]`` uint8; the same number of promoted channels in every block (and head).
    """
    ranked = score.flatten(1) if scope == "layer" else score
    count = promoted_count(ranked.shape[-1], base_bits, width, budget)
    top = ranked.topk(count, dim=-1).indices
    bits = torch.full_like(ranked, base_bits, dtype=torch.uint8).scatter(-1, top, width)
    return bits.view_as(score)


def promoted_count(channels: int, base_bits: int, width: int, budget: float) -> int:
    """How many of ``channels`` can have ``width`` bits instead of ``base_bits`` at a mean of ``budget``."""
    # A hair above, so that a budget written in decimals is not a channel short of what it says.
    return int((budget - base_bits) / (width - base_bits) * channels + 1e-6)
