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
    """``I_d = mean |Q[i, d]|`` over the queries of a KV head's group, and if asked for ``H = mean q q^T``.

    Both are kept as running sums. Old queries are never read again. Padding queries do not count. One row a sequence
    of the batch.

    Attributes:
        total: ``[B, Hkv, D]`` float32, sums of ``|q|``.
        count: ``[B]`` float32, how many (token, head) pairs each sum has.
        moment: ``[B, Hkv, D, D]`` float32, sums of ``q q^T``, or None.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, device: torch.device, *, covariance: bool = False
    ) -> None:
        self.total = torch.zeros(batch, kv_heads, head_dim, dtype=torch.float32, device=device)
        self.count = torch.zeros(batch, dtype=torch.float32, device=device)
        self.moment = self.total.new_zeros(batch, kv_heads, head_dim, head_dim) if covariance else None

    @classmethod
    def of(cls, total: Tensor, count: Tensor, moment: Tensor | None = None) -> QueryStatistics:
        """Statistics that live in tensors of somebody else's, where :meth:`update` adds to them."""
        statistics = cls.__new__(cls)
        statistics.total, statistics.count, statistics.moment = total, count, moment
        return statistics

    def update(self, query: Tensor, real: Tensor | None = None) -> None:
        """Add queries ``[B, Hq, L, D]`` after RoPE; ``real [B, L]`` bool is False at padding."""
        kv_heads = self.total.shape[1]
        group = query.shape[1] // kv_heads
        if real is None:
            self.count += query.shape[2] * group
        else:
            # `where`, not a product: a padding query may hold anything, NaN included.
            query = torch.where(real[:, None, :, None], query, 0)
            self.count += real.sum(1) * group
        per_head = query.abs().sum(2, dtype=torch.float32)
        self.total += per_head.unflatten(1, (kv_heads, group)).sum(2)
        self.add_products(query)

    def add_products(self, query: Tensor) -> None:
        """Add queries ``[B, Hq, L, D]`` to :attr:`moment` alone, where a kernel has seen to the rest."""
        if self.moment is None:
            return
        rows = query.unflatten(1, (self.total.shape[1], -1)).flatten(2, 3).float()
        self.moment += rows.transpose(2, 3) @ rows

    def importance(self) -> Tensor:
        """``I_d [B, Hkv, D]``; ones where no query was seen yet."""
        count = self.count[:, None, None]
        return torch.where(count > 0, self.total / count.clamp(min=1), 1.0)

    def covariance(self) -> Tensor | None:
        """``H [B, Hkv, D, D]``, zeros where no query was seen yet; None if it is not kept."""
        return None if self.moment is None else self.moment / self.count[:, None, None, None].clamp(min=1)

    def rows(self, rows: Tensor) -> QueryStatistics:
        """A copy of the given batch rows, in that order, repeats allowed."""
        moment = None if self.moment is None else self.moment[rows]
        return QueryStatistics.of(self.total[rows], self.count[rows], moment)

    def part(self, start: int, stop: int) -> QueryStatistics:
        """Neighbouring batch rows, which stay these: what is added to the part is added here."""
        moment = None if self.moment is None else self.moment[start:stop]
        return QueryStatistics.of(self.total[start:stop], self.count[start:stop], moment)

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [tensor for tensor in (self.total, self.count, self.moment) if tensor is not None]
