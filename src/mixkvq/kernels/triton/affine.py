"""Device functions that quantize a tile by the formulas of :mod:`mixkvq.quant.affine`, rounded at the same points."""

from __future__ import annotations

import triton
import triton.language as tl

from mixkvq.quant import affine

CLIPPED_LEVELS = tl.constexpr(affine.CLIPPED_LEVELS)
#: 1.5 * 2^23: a sum with it has no room for a fraction, and what is lost is rounded half to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Float32 numbers as ``dtype``, to the nearest, ties to even."""
    return nearest(x, dtype).to(dtype)


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """The nearest number that ``dtype`` can hold, in float32."""
    if dtype == tl.float16:
        x = x.to(tl.float16).to(tl.float32)
    if dtype == tl.bfloat16:
        # On the bits, because the interpreter's own cast cuts off.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def storable(x, form: tl.constexpr):
    """As :func:`mixkvq.quant.affine.storable`. Comparisons, because ``tl.clamp`` loses NaN."""
    x = tl.where(x > form.params.limit, form.params.limit, x)
    x = tl.where(x < -form.params.limit, -form.params.limit, x)
    return nearest(x, form.params.dtype)


@triton.jit
def round_down(x, form: tl.constexpr):
    """The greatest number up to ``x`` that the type of zeros can hold."""
    if form.params.dtype != tl.float32:
        rounded = storable(x, form)
        # The product is taken here: it is too small for a float32 constant.
        smallest = tl.full([1], form.params.tiny, tl.float32) * form.params.eps
        below = storable(rounded - tl.maximum(tl.abs(rounded) * form.params.eps, smallest), form)
        x = tl.where(rounded > x, below, rounded)
    return x


@triton.jit
def fit(low, high, levels, side: tl.constexpr, form: tl.constexpr):
    """Scale and zero of the range from ``low`` to ``high``."""
    if side.symmetric:
        scale = storable(tl.div_rn(2 * high, levels), form)
        zero = -0.5 * levels * scale
    else:
        zero = round_down(low, form)
        scale = storable(tl.div_rn(high - zero, levels), form)
    return scale, zero


@triton.jit
def in_steps(x, scale, zero):
    """How many steps a number lies above zero: its code before rounding."""
    varies = scale > 0
    inverse = tl.div_rn(varies.to(tl.float32), tl.where(varies, scale, 1.0))
    return (x - zero) * inverse


@triton.jit
def encode(steps, levels):
    """Codes, as whole numbers in float32."""
    return (tl.minimum(tl.maximum(steps, 0.0), levels) + ROUNDER) - ROUNDER


@triton.jit
def total(x, inside, axis: tl.constexpr, masked: tl.constexpr):
    """Sums along ``axis``, without what padding holds."""
    if masked:
        x = tl.where(inside, x, 0.0)
    return tl.sum(x, axis=axis, keep_dims=True)


@triton.jit
def bounds(x, inside, axis: tl.constexpr, masked: tl.constexpr):
    """Least and greatest number along ``axis``; NaN where there is one, which ``tl.min`` passes over."""
    low, high = x, x
    if masked:
        low, high = tl.where(inside, x, float("inf")), tl.where(inside, x, float("-inf"))
    low, high = tl.min(low, axis=axis, keep_dims=True), tl.max(high, axis=axis, keep_dims=True)
    spoiled = tl.max((x != x).to(tl.int32), axis=axis, keep_dims=True) > 0
    return tl.where(spoiled, float("nan"), low), tl.where(spoiled, float("nan"), high)


@triton.jit
def squared_error(x, scale, zero, levels, inside, axis: tl.constexpr, masked: tl.constexpr):
    """Of a range's numbers; infinite where the range is a single number, which clipping cannot improve."""
    # The work of the search. Errors are summed in steps, and codes cut off as shares of the highest: limits of 0 and 1
    # cost nothing on NVIDIA's GPUs, others two slow operations. Only ties round otherwise than in `encode`.
    steps = in_steps(x, scale, zero)
    share = tl.minimum(tl.maximum(steps * tl.div_rn(1.0, levels), 0.0), 1.0)
    error = ((share * levels + ROUNDER) - ROUNDER) - steps
    error = total(error * error, inside, axis, masked) * scale * scale
    return tl.where(scale > 0, error, float("inf"))


@triton.jit
def quantize(x, levels, inside, axis: tl.constexpr, masked: tl.constexpr, side: tl.constexpr, form: tl.constexpr):
    """Quantize the groups of a tile that lie along ``axis``.

    Args:
        x: float32.
        levels: the highest code of each group, in float32.
        inside: what is no padding, looked at if ``masked``.

    Returns:
        codes int32, and scale and zero in float32 with ``axis`` reduced to 1.
    """
    low, high = bounds(x, inside, axis, masked)
    if side.symmetric:
        high = tl.maximum(tl.abs(low), tl.abs(high))
        low = -high
    scale, zero = fit(low, high, levels, side, form)
    if len(side.factors) > 0:
        scale, zero = search_clip(x, low, high, scale, zero, levels, inside, axis, masked, side, form)
    codes = encode(in_steps(x, scale, zero), levels)
    if len(side.gains) > 0:
        scale, zero = stretch(x, codes, scale, zero, inside, axis, masked, side, form)
    return codes.to(tl.int32), scale, zero


@triton.jit
def search_clip(
    x,
    low,
    high,
    scale,
    zero,
    levels,
    inside,
    axis: tl.constexpr,
    masked: tl.constexpr,
    side: tl.constexpr,
    form: tl.constexpr,
):
    """The range with the least squared error. Of the best, only scale and zero are kept: codes are cheap to repeat."""
    least = squared_error(x, scale, zero, levels, inside, axis, masked)
    middle, half = (low + high) / 2, (high - low) / 2
    for i in tl.static_range(len(side.factors)):
        reach = half * side.factors[i]
        new_scale, new_zero = fit(middle - reach, middle + reach, levels, side, form)
        error = squared_error(x, new_scale, new_zero, levels, inside, axis, masked)
        better = (error < least) & (levels <= CLIPPED_LEVELS)
        scale, zero = tl.where(better, new_scale, scale), tl.where(better, new_zero, zero)
        least = tl.where(better, error, least)
    return scale, zero


@triton.jit
def stretch_by(power, overlap, side: tl.constexpr):
    """How far what is restored falls short."""
    gain = tl.where(overlap > 0, tl.div_rn(power, tl.where(overlap > 0, overlap, 1.0)), 1.0)
    return tl.minimum(tl.maximum(gain, side.gains[0]), side.gains[1])


@triton.jit
def stretch(
    x,
    codes,
    scale,
    zero,
    inside,
    axis: tl.constexpr,
    masked: tl.constexpr,
    side: tl.constexpr,
    form: tl.constexpr,
):
    """Scale and zero that undo the shrinkage."""
    restored = codes * scale + zero
    if side.symmetric:
        gain = stretch_by(total(x * x, inside, axis, masked), total(x * restored, inside, axis, masked), side)
        scale = tl.where(scale > 0, storable(scale * gain, form), scale)
        return scale, zero  # which is not stored
    count = tl.full(scale.shape, side.group, tl.float32)
    mean = tl.div_rn(total(x, inside, axis, masked), count)
    restored_mean = tl.div_rn(total(restored, inside, axis, masked), count)
    centred = x - mean
    power = total(centred * centred, inside, axis, masked)
    overlap = total(centred * (restored - restored_mean), inside, axis, masked)
    gain = stretch_by(power, overlap, side)
    new_zero = storable(mean + gain * (zero - restored_mean), form)
    return tl.where(scale > 0, storable(scale * gain, form), scale), tl.where(scale > 0, new_zero, zero)
