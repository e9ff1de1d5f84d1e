"""Which key channels matter: importance, sensitivity, salience (section 4 of arXiv 2512.19206).

A channel's quantization error reaches an attention logit multiplied by the query, so it matters when the channel is
both hard to quantize and used: ``A_d = I_d * S_d``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.quant.affine import step_size


def sensitivity(keys: Tensor, group: int, bits: int) -> Tensor:
    """``S_d``: the step a channel would have at ``bits`` bits, averaged over the groups of tokens in the block.

    Args:
        keys: ``[N, Hkv, R, D]``, blocks of R tokens.
        group: tokens of one channel that share a scale; divides R.
        bits: the lowest tier's width.

    Returns:
        ``[N, Hkv, D]`` float32.
    """
    low, high = keys.float().unflatten(2, (-1, group)).aminmax(dim=3)
    return step_size(low, high, bits).mean(2)


class QueryStatistics:
    """``I_d = mean |Q[i, d]|`` over the queries of a KV head's group, kept as a running sum.

    Old queries are never read again. Padding queries do not count. One row a sequence of the batch.

    Attributes:
        total: ``[B, Hkv, D]`` float32, sums of ``|q|``.
        count: ``[B]`` float32, how many (token, head) pairs each sum has.
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.total = torch.zeros(batch, kv_heads, head_dim, dtype=torch.float32, device=device)
        self.count = torch.zeros(batch, dtype=torch.float32, device=device)

    @classmethod
    def of(cls, total: Tensor, count: Tensor) -> QueryStatistics:
        """Statistics that live in tensors of somebody else's, where :meth:`update` adds to them."""
        statistics = cls.__new__(cls)
        statistics.total, statistics.count = total, count
        return statistics

    def update(self, query: Tensor, real: Tensor | None = None) -> None:
        """Add queries ``[B, Hq, L, D]`` after RoPE; ``real [B, L]`` bool is False at padding."""
        batch, heads, length, _ = query.shape
        kv_heads = self.total.shape[1]
        magnitude = query.abs()
        if real is None:
            self.count += length * (heads // kv_heads)
        else:
            # `where`, not a product: a padding query may hold anything, NaN included.
            magnitude = torch.where(real[:, None, :, None], magnitude, 0)
            self.count += real.sum(1) * (heads // kv_heads)
        per_head = magnitude.sum(2, dtype=torch.float32)
        self.total += per_head.view(batch, kv_heads, heads // kv_heads, -1).sum(2)

    def importance(self, sequences: Tensor) -> Tensor:
        """``I_d`` of the given rows: ``[N, Hkv, D]``; ones where no query was seen yet."""
        count = self.count[sequences, None, None]
        return torch.where(count > 0, self.total[sequences] / count.clamp(min=1), 1.0)

    def select(self, rows: Tensor) -> None:
        """Keep the given batch rows, in that order, repeats allowed."""
        self.total, self.count = self.total[rows], self.count[rows]
