"""Error feedback before packing: moves the keys of full blocks, so that rounding each channel for itself is then right.

The numbers of :mod:`mixkvq.quant.feedback`, found the way GPTQ does: eliminating channels from the inverse of H as they
are rounded takes one pass with what a program has in registers, where the triangular factor would be needed backwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixkvq.kernels.triton.affine import nearest, quantize
from mixkvq.kernels.triton.codes import product
from mixkvq.kernels.triton.format import TRITON_TYPES, page_format
from mixkvq.quant.block import DENSE_BITS
from mixkvq.quant.feedback import feedback_parts
from mixkvq.store.layout import PageLayout

#: Samples that are read at once.
SAMPLES = tl.constexpr(32)
DENSE = tl.constexpr(DENSE_BITS)


def move_keys(
    keys: Tensor,
    rows: Tensor,
    starts: Tensor,
    active: Tensor,
    bits: Tensor,
    samples: Tensor,
    layout: PageLayout,
    *,
    damping: float,
    key_clip: bool,
    key_unbiased: bool,
) -> None:
    """See :func:`mixkvq.kernels.feedback.move_keys`."""
    form = page_format(
        layout, key_clip=key_clip, key_unbiased=key_unbiased, value_clip=False, value_unbiased=False, rotated=False
    )
    if not len(rows):
        return
    parts = feedback_parts(layout.key_dim)
    channels = max(16, triton.next_power_of_2(triton.cdiv(layout.key_dim, parts)))
    with torch.cuda.device_of(keys):
        _move[(len(rows) * layout.kv_heads, parts)](
            keys,
            *keys.stride()[:3],
            rows,
            starts,
            active,
            bits,
            samples,
            samples.stride()[:3],
            samples.shape[2],
            damping,
            TRITON_TYPES[keys.dtype],
            channels,
            parts,
            form.keys,
            form,
            num_warps=8 if channels * max(channels, layout.tokens) > 64 * 64 else 4,
        )


@triton.jit
def _move(
    keys,
    key_row,
    key_head,
    key_token,
    rows,
    starts,
    active,
    bits,
    samples,
    sample_strides,
    sample_count,
    damping,
    DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    side: tl.constexpr,
    form: tl.constexpr,
):
    """A program moves one part of a head of one block: its inverse ``[D, D]`` and keys ``[D, R]`` stay in registers."""
    block, head = tl.program_id(0) // form.heads, tl.program_id(0) % form.heads
    if tl.load(active + block) == 0:
        return
    row, start = tl.load(rows + block).to(tl.int64), tl.load(starts + block).to(tl.int64)
    part, number, token = tl.program_id(1), tl.arange(0, CHANNELS), tl.arange(0, form.tokens)
    # Contiguous where that is known: tiles that are loaded in vectors keep the whole program within its registers.
    channel = number if PARTS == 1 else number * PARTS + part
    inside = channel < side.dim
    place = keys + row * key_row + head.to(tl.int64) * key_head + start * key_token
    tile = place + channel[:, None] + token[None, :] * key_token
    x = tl.load(tile, mask=inside[:, None], other=0.0).to(tl.float32)
    width = tl.load(bits + (block * form.heads + head) * side.dim + channel, mask=inside, other=DENSE).to(tl.int32)

    sampled = samples + row * sample_strides[0] + head.to(tl.int64) * sample_strides[1] + channel
    matrix = products(sampled, sample_strides[2], sample_count, inside, CHANNELS)
    diagonal = number[:, None] == number[None, :]
    powers = tl.sum(tl.where(diagonal, matrix, 0.0), axis=1)
    score = tl.where(inside, tl.sqrt(tl.maximum(powers, 0.0)) * steps(x, side, form), -1.0)
    score = tl.where(score == score, score, 0.0)  # NaN would never be chosen
    score = tl.where(inside & (width == DENSE), float("inf"), score)
    COUNT: tl.constexpr = (side.dim + PARTS - 1) // PARTS
    power = tl.sum(powers) / COUNT
    if not ((power > 0) & (power < float("inf"))):
        return
    matrix = matrix / power + tl.where(diagonal, tl.where(inside, damping, 1.0)[:, None], 0.0)
    matrix = inverse(matrix, number, COUNT)

    for _ in range(COUNT):
        chosen = tl.argmax(score, axis=0)
        picked = number == chosen
        score = tl.where(picked, -2.0, score)
        bits_here = tl.sum(tl.where(picked, width, 0))
        weights = tl.sum(tl.where(picked[:, None], matrix, 0.0), axis=0)
        shares = weights / tl.sum(tl.where(picked, weights, 0.0))
        if bits_here != DENSE:
            # What is stored is what is packed, so the error is that of the stored number.
            key = nearest(tl.sum(tl.where(picked[:, None], x, 0.0), axis=0), DTYPE)
            tl.store(place + chosen * PARTS + part + token * key_token, key.to(DTYPE))
            levels = tl.full([1, 1, 1], 1, tl.int32) << bits_here
            grouped = tl.reshape(key, [1, side.groups, side.group])
            codes, scale, zero = quantize(grouped, (levels - 1).to(tl.float32), inside, 2, False, side, form)
            error = key - tl.reshape(codes * scale + zero, [form.tokens])
            x -= shares[:, None] * error[None, :]
        matrix -= weights[:, None] * shares[None, :]


@triton.jit
def steps(x, side: tl.constexpr, form: tl.constexpr):
    """``S_d`` of a tile ``[D, R]``, as :func:`mixkvq.quant.salience.sensitivity`: ``[D]``."""
    grouped = tl.reshape(x, [x.shape[0], side.groups, side.group])
    spread = tl.max(grouped, axis=2) - tl.min(grouped, axis=2)
    return tl.sum(spread, axis=1) / (side.groups * ((1 << side.bits) - 1))


@triton.jit
def products(samples, stride, count, inside, CHANNELS: tl.constexpr):
    """``H [CHANNELS, CHANNELS]`` up to a factor, of ``count`` rows to which ``samples`` points, channel by channel."""
    total = tl.zeros([CHANNELS, CHANNELS], tl.float32)
    for first in range(0, count, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        mask = (sample < count)[:, None] & inside[None, :]
        q = tl.load(samples[None, :] + sample[:, None] * stride, mask=mask, other=0.0)
        total = product(tl.trans(q), q, total)
    return total


@triton.jit
def inverse(matrix, number, COUNT: tl.constexpr):
    """Of a positive definite matrix, by sweeping its first ``COUNT`` rows, which are numbered, one after the other."""
    for i in range(COUNT):
        here = number == i
        line = tl.sum(tl.where(here[:, None], matrix, 0.0), axis=0)
        pivot = tl.sum(tl.where(here, line, 0.0))
        scaled = line / pivot
        swept = matrix - line[:, None] * scaled[None, :]
        swept = tl.where(here[:, None], scaled[None, :], swept)
        swept = tl.where(here[None, :], scaled[:, None], swept)
        matrix = tl.where(here[:, None] & here[None, :], -1.0 / pivot, swept)
    return -matrix
