"""Device functions for the logits of the packed tokens of a page.

Logits are tuples of tiles ``[16 tokens, rows]`` in float32, one for every entry of ``F.tile_starts[STEP]``.
"""

# Triton compiles what follows a return, and knows no starred tuples.
# ruff: noqa: RET505, RUF005, SIM300
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.kernels.triton.codes import code_bias, key_codes, lane_codes, load_where, operand, product, rounded


@triton.jit
def base_scores(page, head, query, STEP: tl.constexpr, F: tl.constexpr, DTYPE: tl.constexpr):
    """What the base planes give: scales multiply the query, and never the codes, where a tile has one of each channel.

    Args:
        page: pointer to the page's bytes.
        query: ``[channels, rows]`` float32, 0 past ``F.key_dim``.
        DTYPE: type of the products.
    """
    CHANNELS: tl.constexpr = query.shape[0]
    TILES: tl.constexpr = len(F.tile_starts[STEP])
    BIAS: tl.constexpr = code_bias(F.key_planes, DTYPE)
    channel = tl.arange(0, CHANNELS)
    inside = channel < F.key_dim
    scale_row = (page + F.key_scale).to(tl.pointer_type(F.param)) + head * (F.key_groups * F.key_dim) + channel
    zero_row = (page + F.key_zero).to(tl.pointer_type(F.param)) + head * (F.key_groups * F.key_dim) + channel
    scores = ()
    for i in tl.static_range(TILES):
        if F.key_group % 16 == 0:
            if i == 0 or F.key_groups > 1:
                group = F.tile_starts[STEP][i] // F.key_group * F.key_dim
                scale = load_where(scale_row + group, inside, CHANNELS == F.key_dim).to(tl.float32)
                zero = load_where(zero_row + group, inside, CHANNELS == F.key_dim).to(tl.float32)
                scaled = rounded(query * scale[:, None], DTYPE)
                offset = tl.sum(query * zero[:, None] - BIAS * scaled.to(tl.float32), 0)
            codes = key_codes(page, head, F.tile_starts[STEP][i], F, CHANNELS, BIAS)
            tile = product(operand(codes, BIAS, DTYPE), scaled, everywhere(offset))
        else:
            group = (F.tile_starts[STEP][i] + tl.arange(0, 16)) // F.key_group * F.key_dim
            scale = tl.load(scale_row[None, :] + group[:, None], mask=inside[None, :], other=0).to(tl.float32)
            zero = tl.load(zero_row[None, :] + group[:, None], mask=inside[None, :], other=0).to(tl.float32)
            codes = key_codes(page, head, F.tile_starts[STEP][i], F, CHANNELS, 0).to(tl.float32)
            tile = product(rounded(codes * scale + zero, DTYPE), rounded(query, DTYPE))
        scores = scores + (tile,)
    return scores


@triton.jit
def stored_scores(page, head, query, factor, STEP: tl.constexpr, F: tl.constexpr):
    """Logits where pages hold keys of the model's own type.

    Args:
        query: ``[channels, rows]`` in the queries' type.
        factor: of the logits.
    """
    CHANNELS: tl.constexpr = query.shape[0]
    TILES: tl.constexpr = len(F.tile_starts[STEP])
    channel = tl.arange(0, CHANNELS)[None, :]
    first = (page + F.keys).to(tl.pointer_type(F.stored)) + head * (F.tokens * F.key_dim) + channel
    scores = ()
    for i in tl.static_range(TILES):
        token = F.tile_starts[STEP][i] + tl.arange(0, 16)[:, None]
        keys = tl.load(first + token * F.key_dim, mask=channel < F.key_dim, other=0)
        scores = scores + (product(rounded(keys, query.dtype), query) * factor,)
    return scores


@triton.jit
def add_code_lanes(
    scores,
    page,
    head,
    chunks,
    query_rows,
    valid_rows,
    factor,
    NUMBER: tl.constexpr,
    STEP: tl.constexpr,
    F: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``scores`` with what the low bits of channels promoted to one width add, a chunk at a time.

    Args:
        chunks: pointer to the first chunk of that width, which is NUMBER among ``F.tiers``.
        query_rows, valid_rows: ``[rows]`` pointers to the first channel of the query's rows, and which rows there are.
        factor: what the query's numbers are multiplied by.
        DTYPE: type of the products.
    """
    TIER: tl.constexpr = F.tiers[NUMBER]
    TILES: tl.constexpr = len(F.tile_starts[STEP])
    LANES: tl.constexpr = TIER.lanes
    BIAS: tl.constexpr = code_bias(TIER.planes, DTYPE)
    STEP_OF_LOW: tl.constexpr = 2.0**-TIER.planes.bits
    run, first, last = head_lanes(page, head, TIER)
    scale_row = (page + F.key_scale).to(tl.pointer_type(F.param)) + head * (F.key_groups * F.key_dim)
    for number in range(first // LANES, tl.cdiv(last, LANES)):
        chunk = chunks + (run + number).to(tl.int64) * TIER.nbytes
        lane = tl.arange(0, LANES)
        # The first and the last chunk may hold lanes of other heads, and lanes of nobody.
        owned = (number * LANES + lane >= first) & (number * LANES + lane < last)
        channel = lane_channels(chunk, lane, owned, TIER)
        query = lane_query(query_rows, valid_rows, channel, owned).to(tl.float32) * factor
        column = scale_row + channel
        sums = ()
        for i in tl.static_range(TILES):
            if F.key_group % 16 == 0:
                if i == 0 or F.key_groups > 1:
                    group = F.tile_starts[STEP][i] // F.key_group * F.key_dim
                    scale = tl.load(column + group, mask=owned, other=0).to(tl.float32) * STEP_OF_LOW
                    scaled = rounded(query * scale[:, None], DTYPE)
                    offset = BIAS * tl.sum(scaled.to(tl.float32), 0)
                codes = lane_codes(chunk, F.tile_starts[STEP][i], TIER, BIAS)
                tile = product(operand(codes, BIAS, DTYPE), scaled, scores[i] - offset[None, :])
            else:
                group = (F.tile_starts[STEP][i] + tl.arange(0, 16)) // F.key_group * F.key_dim
                scale = tl.load(column[None, :] + group[:, None], mask=owned[None, :], other=0)
                codes = lane_codes(chunk, F.tile_starts[STEP][i], TIER, 0)
                keys = codes.to(tl.float32) * (scale.to(tl.float32) * STEP_OF_LOW)
                tile = product(rounded(keys, DTYPE), rounded(query, DTYPE), scores[i])
            sums = sums + (tile,)
        scores = sums
    return scores


@triton.jit
def add_dense_lanes(
    scores,
    page,
    head,
    chunks,
    query_rows,
    valid_rows,
    factor,
    NUMBER: tl.constexpr,
    STEP: tl.constexpr,
    F: tl.constexpr,
):
    """``scores`` with what the channels add that are kept in the model's type, 16 at a time; see above."""
    TIER: tl.constexpr = F.tiers[NUMBER]
    TILES: tl.constexpr = len(F.tile_starts[STEP])
    run, first, last = head_lanes(page, head, TIER)
    for start in range(first, last, 16):
        lane = start + tl.arange(0, 16)
        owned = lane < last
        chunk = chunks + (run + lane).to(tl.int64) * TIER.nbytes
        channel = lane_channels(chunk, 0, owned, TIER)
        query = lane_query(query_rows, valid_rows, channel, owned)
        column = (chunk + TIER.keys).to(tl.pointer_type(F.promoted))
        sums = ()
        for i in tl.static_range(TILES):
            token = F.tile_starts[STEP][i] + tl.arange(0, 16)
            keys = tl.load(column[None, :] + token[:, None], mask=owned[None, :], other=0)
            sums = sums + (scores[i] + product(rounded(keys, query.dtype), query) * factor,)
        scores = sums
    return scores


@triton.jit
def head_lanes(page, head, TIER: tl.constexpr):
    """First chunk of a page's run, and which lanes of the run are a head's: first, and last + 1."""
    run = tl.load((page + TIER.run).to(tl.pointer_type(tl.int32)))
    bounds = (page + TIER.first_lane).to(tl.pointer_type(tl.int16)) + head
    return run, tl.load(bounds).to(tl.int32), tl.load(bounds + 1).to(tl.int32)


@triton.jit
def lane_channels(chunk, lane, owned, TIER: tl.constexpr):
    """Channel numbers of some lanes: ``[lanes]`` int32, 0 where the lane is not ``owned``."""
    if TIER.channel_bytes == 1:
        return tl.load(chunk + TIER.channel + lane, mask=owned, other=0).to(tl.int32)
    else:
        return tl.load((chunk + TIER.channel).to(tl.pointer_type(tl.int16)) + lane, mask=owned, other=0).to(tl.int32)


@triton.jit
def lane_query(query_rows, valid_rows, channel, owned):
    """The query's numbers for some lanes: ``[lanes, rows]``, 0 where the lane is not ``owned``."""
    return tl.load(query_rows[None, :] + channel[:, None], mask=owned[:, None] & valid_rows[None, :], other=0)


@triton.jit
def everywhere(offset):
    """``offset [rows]`` for each of 16 tokens."""
    return tl.zeros((16, 1), tl.float32) + offset[None, :]
