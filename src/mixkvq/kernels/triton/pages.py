"""Device functions for attention over the packed pages of a sequence."""

# Triton compiles what follows a return, and knows no starred tuples.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.kernels.triton.scores import add_code_lanes, add_dense_lanes, base_scores, stored_scores
from mixkvq.kernels.triton.softmax import capped, new_maximum
from mixkvq.kernels.triton.weighted import add_values, no_sums


@triton.jit
def attend_pages(
    query,
    query_rows,
    valid_rows,
    pages,
    chunks,
    table,
    first,
    last,
    head,
    factor,
    cap,
    SOFTCAP: tl.constexpr,
    F: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Attention over blocks ``first`` to ``last`` of a sequence.

    Args:
        query: ``[channels, rows]`` in the queries' type, not scaled, 0 past ``F.key_dim``.
        query_rows, valid_rows: ``[rows]`` pointers to the first channel of each row, and which rows there are.
        pages, chunks: pointers to the first page, and to the first chunk of every tier.
        table: pointer to the sequence's page numbers.
        factor, cap: see :mod:`mixkvq.kernels.triton.softmax`.
        DTYPE: type of products with codes.

    Returns:
        Maximum ``[rows]``, mass ``[rows]``, and for every value group the sum ``[GROUP_CHANNELS, rows]``.
    """
    ROWS: tl.constexpr = query.shape[1]
    STEPS: tl.constexpr = len(F.tile_starts)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((16, ROWS), tl.float32)
    sums, offsets = no_sums(F, GROUP_CHANNELS, ROWS)
    scaled = query.to(tl.float32) * factor
    number = tl.load(table + first)
    for block in range(first, last):
        page = pages + number.to(tl.int64) * F.nbytes
        # One page ahead, so that nothing waits for it.
        number = tl.load(table + tl.minimum(block + 1, last - 1))
        for step in tl.static_range(STEPS):
            if F.dense_keys:
                scores = stored_scores(page, head, query, factor, step, F)
            else:
                scores = base_scores(page, head, scaled, step, F, DTYPE)
            scores = promoted_scores(scores, page, head, chunks, query_rows, valid_rows, factor, step, F, DTYPE)
            weights, mass, decay, top = exponentials(scores, mass, top, cap, SOFTCAP)
            sums, offsets = add_values(
                sums, offsets, weights, decay, page, head, step, F, GROUP_CHANNELS, DTYPE, query.dtype
            )
    return top, tl.sum(mass, 0), whole(sums, offsets)


@triton.jit
def promoted_scores(
    scores,
    page,
    head,
    chunks,
    query_rows,
    valid_rows,
    factor,
    STEP: tl.constexpr,
    F: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``scores`` with what promoted channels of all tiers add."""
    TIERS: tl.constexpr = len(F.tiers)
    for i in tl.static_range(TIERS):
        if F.tiers[i].dense:
            scores = add_dense_lanes(scores, page, head, chunks[i], query_rows, valid_rows, factor, i, STEP, F)
        else:
            scores = add_code_lanes(scores, page, head, chunks[i], query_rows, valid_rows, factor, i, STEP, F, DTYPE)
    return scores


@triton.jit
def exponentials(scores, mass, top, cap, SOFTCAP: tl.constexpr):
    """Softmax weights of a step's logits before normalization.

    Returns:
        The weights as tiles, ``mass [16, rows]`` with them added, what sums so far are to be multiplied by, and the new
        maximum.
    """
    TILES: tl.constexpr = len(scores)
    logits = ()
    for i in tl.static_range(TILES):
        logits = logits + (capped(scores[i], cap, SOFTCAP),)
    new_top = new_maximum(top, logits)
    decay = tl.exp2(top - new_top)
    mass *= decay[None, :]
    weights = ()
    for i in tl.static_range(TILES):
        weight = tl.exp2(logits[i] - new_top[None, :])
        weights = weights + (weight,)
        mass += weight
    return weights, mass, decay, new_top


@triton.jit
def whole(sums, offsets):
    """``sums`` with ``offsets`` added."""
    GROUPS: tl.constexpr = len(sums)
    added = ()
    for g in tl.static_range(GROUPS):
        added = added + (sums[g] + tl.sum(offsets[g], 0)[None, :],)
    return added
