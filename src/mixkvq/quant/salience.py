"""Which key channels matter: importance, sensitivity, salience (section 4 of arXiv 2512.19206).

A channel's quantization error reaches an attention logit multiplied by the query, so it matters when the channel is
both hard to quantize and used: ``A_d = I_d * S_d``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.quant.affine import step_size

#: Of every so many tokens, one query head's query is sampled.
SAMPLED_EVERY = 4
#: Samples that are kept of a sequence and KV head, the newest: those of the last 512 tokens.
KEPT_SAMPLES = 128
#: At most so many samples of a prompt serve the blocks that it completes.
PROMPT_SAMPLES = 512


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
    """``I_d = mean |Q[i, d]|`` over the queries of a KV head's group, and if asked for, samples of recent queries.

    The means are kept as running sums: old queries are never read again. Samples are for ``H = E[q q^T]``, which would
    be D x D numbers to read and to write at every token. Padding queries do not count. One row a sequence of the batch.

    Attributes:
        total: ``[B, Hkv, D]`` float32, sums of ``|q|``.
        count: ``[B]`` float32, how many (token, head) pairs each sum has.
        samples: ``[B, Hkv, S, D]`` queries, zeros where none was kept yet, or None.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        *,
        sample_dtype: torch.dtype | None = None,
    ) -> None:
        self.total = torch.zeros(batch, kv_heads, head_dim, dtype=torch.float32, device=device)
        self.count = torch.zeros(batch, dtype=torch.float32, device=device)
        self.samples: Tensor | None = None
        if sample_dtype is not None:
            self.samples = self.total.new_zeros(batch, kv_heads, KEPT_SAMPLES, head_dim, dtype=sample_dtype)

    @classmethod
    def of(cls, total: Tensor, count: Tensor, samples: Tensor | None = None) -> QueryStatistics:
        """Statistics that live in tensors of somebody else's, where they are kept up to date."""
        statistics = cls.__new__(cls)
        statistics.total, statistics.count, statistics.samples = total, count, samples
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

    def sample(self, query: Tensor, lengths: Tensor, real: Tensor | None = None) -> None:
        """Keep samples of queries ``[B, Hq, L, D]`` of tokens that follow ``lengths [B]`` earlier ones of theirs.

        Token ``p`` of a sequence is sampled if 4 divides it: sample ``s = p / 4`` is the query of head ``s`` modulo
        the heads of the group, and takes the place of sample ``s - 128``.
        """
        if self.samples is None:
            return
        kv_heads, kept = self.samples.shape[1:3]
        seen = _real_so_far(query, real)
        newest = (lengths + seen[:, -1] - 1).long().div(SAMPLED_EVERY, rounding_mode="floor")[:, None]
        slot = torch.arange(kept, device=query.device)
        number = newest - (newest - slot) % kept
        place = number * SAMPLED_EVERY - lengths[:, None]
        found = _queries(query, kv_heads, seen, place, number)
        self.samples.copy_(torch.where((place >= 0)[:, None, :, None], found, self.samples))

    def with_prompt(self, query: Tensor, real: Tensor | None = None) -> QueryStatistics:
        """These, for the blocks that a prompt ``query [B, Hq, L, D]`` completes: with samples from all over it, too.

        A sequence of at most 512 real tokens has no more: the ring holds its samples.
        """
        length, covered = query.shape[2], KEPT_SAMPLES * SAMPLED_EVERY
        if self.samples is None or length <= covered:
            return self
        seen = _real_so_far(query, real)
        count = seen[:, -1:]
        every = SAMPLED_EVERY * (-count).div(SAMPLED_EVERY * PROMPT_SAMPLES, rounding_mode="floor").neg().clamp(min=1)
        most = min(PROMPT_SAMPLES, -(-length // SAMPLED_EVERY))
        number = torch.arange(most, device=query.device).expand(len(count), -1)
        place = number * every
        found = _queries(query, self.samples.shape[1], seen, place, number)
        found = torch.where(((place < count) & (count > covered))[:, None, :, None], found, 0)
        samples = torch.cat([self.samples, found.to(self.samples.dtype)], 2)
        return QueryStatistics.of(self.total, self.count, samples)

    def importance(self) -> Tensor:
        """``I_d [B, Hkv, D]``; ones where no query was seen yet."""
        count = self.count[:, None, None]
        return torch.where(count > 0, self.total / count.clamp(min=1), 1.0)

    def covariance(self) -> Tensor | None:
        """``H [B, Hkv, D, D]`` of the samples, up to a factor; zeros where there is none yet. None without samples."""
        if self.samples is None:
            return None
        samples = self.samples.float()
        return samples.transpose(2, 3) @ samples

    def rows(self, rows: Tensor) -> QueryStatistics:
        """A copy of the given batch rows, in that order, repeats allowed."""
        samples = None if self.samples is None else self.samples[rows]
        return QueryStatistics.of(self.total[rows], self.count[rows], samples)

    def part(self, start: int, stop: int) -> QueryStatistics:
        """Neighbouring batch rows, which stay these: what is added to the part is added here."""
        samples = None if self.samples is None else self.samples[start:stop]
        return QueryStatistics.of(self.total[start:stop], self.count[start:stop], samples)

    def tensors(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [tensor for tensor in (self.total, self.count, self.samples) if tensor is not None]


def _real_so_far(query: Tensor, real: Tensor | None) -> Tensor:
    """``[B, L]``: real tokens up to each of ``query [B, Hq, L, D]``."""
    batch, _, length, _ = query.shape
    if real is None:
        return torch.arange(1, length + 1, device=query.device).repeat(batch, 1)
    return real.cumsum(1)


def _queries(query: Tensor, kv_heads: int, seen: Tensor, place: Tensor, number: Tensor) -> Tensor:
    """``[B, Hkv, S, D]``: of each row's real tokens ``place [B, S]``, the query of head ``number`` modulo the group's.

    ``query [B, Hq, L, D]``; ``seen [B, L]`` counts the real tokens. Places that are none give some query.
    """
    column = torch.searchsorted(seen, place + 1).clamp(max=query.shape[2] - 1)
    rows = torch.arange(len(place), device=query.device)[:, None]
    grouped = query.unflatten(1, (kv_heads, -1))
    return grouped[rows, :, number % grouped.shape[2], column].transpose(1, 2)
