"""Device functions that quantize and pack the keys of one head of one block."""

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.kernels.triton.affine import cast, quantize, storable
from mixkvq.kernels.triton.planes import field, words
from mixkvq.quant.block import DENSE_BITS

DENSE = tl.constexpr(DENSE_BITS)


@triton.jit
def pack_keys(
    source,
    token_stride: tl.constexpr,
    channel_stride,
    bits,
    head,
    page,
    block,
    run_starts,
    chunks,
    side: tl.constexpr,
    form: tl.constexpr,
):
    """Keys ``[R, D]`` at ``source`` into a page and its chunks, a tile of channels after the other.

    Tiles are ``[channels, tokens]``, and the channels' stride is not known to the compiler, so that it gives every
    thread one channel: what there is of a channel (scale, zero, error) takes one register, and sums need no shuffles.

    Args:
        bits: pointer to the block's widths ``[Hkv, D]``.
        page: pointer to the page's record.
        run_starts, chunks: for every tier, pointers to the first chunks of all blocks and to the pool.
    """
    token = tl.arange(0, form.tokens)[None, :]
    for first in range(0, side.dim, side.tile):
        channel = first + tl.arange(0, side.tile)
        inside = channel < side.dim
        place = source + channel[:, None] * channel_stride + token * token_stride
        x = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
        if side.dense:
            place = field(page, side.copy, form.dense_dtype) + (head * form.tokens + token) * side.dim
            tl.store(place + channel[:, None], cast(x, form.dense_dtype), mask=inside[:, None])
        else:
            width = tl.load(bits + head * side.dim + channel, mask=inside, other=0).to(tl.int32)
            codes = pack_base(x, width, head, page, channel, inside, side, form)
            for k in tl.static_range(len(form.tiers)):
                before = lanes_before(bits, head * side.dim + first, form, k)
                start = tl.load(run_starts[k] + block)
                pack_lanes(x, codes, width, channel, before, start, chunks[k], form, k)
    for k in tl.static_range(len(form.tiers)):
        close_run(bits, head, page, tl.load(run_starts[k] + block), chunks[k], form, k)


@triton.jit
def lanes_before(bits, end, form: tl.constexpr, k: tl.constexpr):
    """How many of a block's channels before number ``end``, counted through all heads, are of tier ``k``."""
    index = tl.arange(0, form.channels)
    plan = tl.load(bits + index, mask=index < end, other=0).to(tl.int32)
    return tl.sum((plan == form.tiers[k].bits).to(tl.int32))


@triton.jit
def pack_base(x, width, head, page, channel, inside, side: tl.constexpr, form: tl.constexpr):
    """What the page says of a tile: base planes, scales, zeros. Returns the whole codes ``[C, R]``."""
    dense = (width == DENSE) | (width == 0)  # 0: padding
    levels = ((1 << tl.where(dense, 1, width)) - 1).to(tl.float32)
    grouped = tl.reshape(x, [side.tile, side.groups, side.group])
    codes, scale, zero = quantize(grouped, levels[:, None, None], inside, 2, False, side, form)
    codes = tl.where(dense[:, None], 0, tl.reshape(codes, [side.tile, form.tokens]))
    extra = tl.where(dense[:, None], 0, width[:, None] - side.bits)

    group = tl.arange(0, side.groups)[None, :]
    place = (head * side.groups + group) * side.dim + channel[:, None]
    scale = tl.reshape(scale, [side.tile, side.groups]) * (1 << extra).to(tl.float32)
    scale = tl.where(dense[:, None], 0.0, storable(scale, form)).to(form.params.dtype)
    zero = tl.where(dense[:, None], 0.0, tl.reshape(zero, [side.tile, side.groups])).to(form.params.dtype)
    tl.store(field(page, side.scale, form.params.dtype) + place, scale, mask=inside[:, None])
    tl.store(field(page, side.zero, form.params.dtype) + place, zero, mask=inside[:, None])

    base = codes >> extra
    for i in tl.static_range(len(side.planes.offsets)):
        plane = words(base, side.planes.widths[i], side.planes.shifts[i])
        word = head * plane.shape[1] + tl.arange(0, plane.shape[1])[None, :]
        place = field(page, side.planes.offsets[i], tl.int16) + word * side.dim
        tl.store(place + channel[:, None], plane, mask=inside[:, None])
    return codes


@triton.jit
def pack_lanes(x, codes, width, channel, before, start, chunks, form: tl.constexpr, k: tl.constexpr):
    """A tile's channels of tier ``k`` into its lanes, of which ``before`` are taken by channels before the tile."""
    promoted = width == form.tiers[k].bits
    lane = before + tl.cumsum(promoted.to(tl.int32), 0) - 1
    record = chunks + (start + lane // form.tiers[k].lanes).to(tl.int64) * form.tiers[k].nbytes
    column = lane % form.tiers[k].lanes
    numbers = field(record, form.tiers[k].channel, form.tiers[k].channel_dtype) + column
    tl.store(numbers, channel.to(form.tiers[k].channel_dtype), mask=promoted)
    if form.tiers[k].dense:
        token = tl.arange(0, form.tokens)[None, :]
        place = field(record, form.tiers[k].keys, form.promoted_dtype)[:, None] + token
        tl.store(place, cast(x, form.promoted_dtype), mask=promoted[:, None])
    else:
        low = codes & ((1 << form.tiers[k].extra) - 1)
        for i in tl.static_range(len(form.tiers[k].planes.offsets)):
            plane = words(low, form.tiers[k].planes.widths[i], form.tiers[k].planes.shifts[i])
            word = tl.arange(0, plane.shape[1])[None, :]
            place = (field(record, form.tiers[k].planes.offsets[i], tl.int16) + column)[:, None]
            tl.store(place + word * form.tiers[k].lanes, plane, mask=promoted[:, None])


@triton.jit
def close_run(bits, head, page, start, chunks, form: tl.constexpr, k: tl.constexpr):
    """The page's index of tier ``k``: each head writes its own first lane, the last one everything after the lanes."""
    dim: tl.constexpr = form.key_dim
    first_lane = field(page, form.tiers[k].first_lane, tl.int16)
    tl.store(first_lane + head, lanes_before(bits, head * dim, form, k).to(tl.int16))
    if head == form.heads - 1:
        lanes = lanes_before(bits, form.heads * dim, form, k)
        count = tl.cdiv(lanes, form.tiers[k].lanes)
        run = field(page, form.tiers[k].run, tl.int32)
        tl.store(first_lane + form.heads, lanes.to(tl.int16))
        tl.store(run, start)
        tl.store(run + 1, count)
        if form.tiers[k].lanes > 1:
            clear_spare_lanes(lanes, start + count - 1, chunks, form, k)


@triton.jit
def clear_spare_lanes(lanes, last, chunks, form: tl.constexpr, k: tl.constexpr):
    """Zeros where the last chunk has lanes to spare: readers load them, and their channel must be one."""
    column = tl.arange(0, form.tiers[k].lanes)
    left = lanes % form.tiers[k].lanes
    spare = column >= tl.where(left == 0, form.tiers[k].lanes, left)
    record = chunks + last.to(tl.int64) * form.tiers[k].nbytes
    numbers = field(record, form.tiers[k].channel, form.tiers[k].channel_dtype)
    tl.store(numbers + column, tl.zeros_like(column).to(form.tiers[k].channel_dtype), mask=spare)
    for i in tl.static_range(len(form.tiers[k].planes.offsets)):
        count: tl.constexpr = form.tokens * form.tiers[k].planes.widths[i] // 16
        place = tl.arange(0, count)[:, None] * form.tiers[k].lanes + column[None, :]
        plane = field(record, form.tiers[k].planes.offsets[i], tl.int16)
        tl.store(plane + place, tl.zeros_like(place).to(tl.int16), mask=spare[None, :])
