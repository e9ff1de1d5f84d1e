"""Device functions that keep query statistics up to date, as :class:`mixkvq.quant.salience.QueryStatistics` does."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.quant import salience

KEPT_SAMPLES = tl.constexpr(salience.KEPT_SAMPLES)
SAMPLED_EVERY = tl.constexpr(salience.SAMPLED_EVERY)
#: Query rows that are read at once.
TILE = tl.constexpr(8)


@triton.jit
def add_magnitudes(total, query, head_stride, token_stride, group, length, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Add ``|q|``, summed over ``group`` query heads and ``length`` tokens, to ``total [DIM]`` float32.

    ``query`` points to the first of the heads, of channels that lie next to each other.
    """
    channel = tl.arange(0, CHANNELS)
    magnitude = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, group * length, TILE):
        row = start + tl.arange(0, TILE)[None, :]
        source = query + row // length * head_stride + row % length * token_stride + channel[:, None]
        inside = (row < group * length) & (channel < DIM)[:, None]
        magnitude += tl.sum(tl.abs(tl.load(source, mask=inside, other=0).to(tl.float32)), 1)
    old = tl.load(total + channel, mask=channel < DIM, other=0)
    tl.store(total + channel, old + magnitude, mask=channel < DIM)


@triton.jit
def keep_samples(
    samples, query, head_stride, token_stride, stored, group, length, DIM: tl.constexpr, CHANNELS: tl.constexpr
):
    """Write the queries that are sampled, of ``length`` tokens after ``stored`` others, into ``samples [S, DIM]``."""
    channel = tl.arange(0, CHANNELS)
    inside = channel < DIM
    for token in range(length):
        position = stored + token
        if position % SAMPLED_EVERY == 0:
            number = position // SAMPLED_EVERY
            source = query + number % group * head_stride + token * token_stride
            found = tl.load(source + channel, mask=inside, other=0)
            place = samples + number % KEPT_SAMPLES * DIM
            tl.store(place + channel, found.to(samples.dtype.element_ty), mask=inside)
