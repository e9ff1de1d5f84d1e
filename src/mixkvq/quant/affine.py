"""Uniform quantization of groups, with two optional refinements of scale and zero.

For a group ``x`` and ``b`` bits (method section "Preliminaries" of arXiv 2512.19206, after KIVI)::

    scale = (max x - min x) / (2^b - 1)
    zero  = min x
    code  = clamp(round((x - zero) / scale), 0, 2^b - 1)
    x~    = code * scale + zero

``scale`` and ``zero`` are rounded to the type they are stored in *before* the codes are computed, so the codes
make up for that rounding. A constant group has ``scale = 0`` and comes back exactly, if
the storage type holds its value (float16 holds all bfloat16 numbers of magnitude 2^-14 to 65504).

**Symmetric**: for groups with a mean near 0, no zero needs to be stored::

    scale = 2 max |x| / (2^b - 1)
    zero  = -(2^b - 1) / 2 * scale

**Clipping**: a smaller range costs the extremes and serves the rest; the range with the least squared error is taken.
Only up to 3 bits: with more, little is won, and the extremes it costs are often the tokens that attention looks for.

**Unbiased scale**: what quantization with the least squared error gives back is shrunk towards the group's mean, by
``<x, x~> / <x, x>`` (both centred). Noise averages out over the tokens that attention sums; shrinkage does not. So
scale and zero are stretched about the mean until ``<x, x~> = <x, x>``, and the codes stay. It costs nothing to store or
to read. The same scale makes the gradient compressors DRIVE (arXiv 2105.08339) and EDEN (2108.08842) unbiased.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: How far the range of a group is shrunk about its midpoint when a better clipping range is searched.
CLIP_FACTORS = (1.0, 0.92, 0.84, 0.76, 0.68)
#: The same about 0, for symmetric groups: with few codes the best range ends well below the largest of many numbers.
SYMMETRIC_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
#: The highest code of groups whose range is searched.
CLIPPED_LEVELS = 7
#: Bounds of the stretch that undoes shrinkage: a group far outside them is degenerate, not shrunk.
GAINS = (0.5, 2.0)


class Affine(NamedTuple):
    """Codes of groups with what turns them back into numbers.

    ``codes`` has the shape of the input, type uint8; ``scale`` and ``zero`` are float32 holding values that the
    storage type represents exactly, with the group dimension reduced to 1.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(
    x: Tensor,
    bits: int | Tensor,
    *,
    clip: bool = False,
    unbiased: bool = False,
    symmetric: bool = False,
    param_dtype: torch.dtype = torch.float32,
) -> Affine:
    """Quantize groups that lie along the last dimension.

    Args:
        x: ``[..., G]``, groups of ``G`` numbers.
        bits: 1 to 8, or an integer tensor that broadcasts against ``[..., 1]`` with a width for every group.
        clip: choose, per group of up to 3 bits, the range with the least squared error, among :data:`CLIP_FACTORS` or
            :data:`SYMMETRIC_FACTORS`.
        unbiased: stretch scale and zero about the group's mean, so that the result is not shrunk.
        symmetric: ``zero`` is what :func:`symmetric_zero` makes of ``scale``.
        param_dtype: the type in which scales and zeros will be stored.

    Returns:
        ``codes [..., G]`` uint8 and ``scale, zero [..., 1]`` float32.
    """
    x = x.float()
    levels = _levels(bits, x.device)
    if isinstance(bits, int):
        clip = clip and is_clipped(bits)
    if symmetric:
        return _quantize_symmetric(x, levels, clip=clip, unbiased=unbiased, dtype=param_dtype)
    low, high = x.aminmax(dim=-1, keepdim=True)
    q = _quantize_range(x, low, high, levels, param_dtype)
    if clip:
        q = _search_clip(x, low, high, levels, q, param_dtype)
    return _stretch(x, q, param_dtype) if unbiased else q


def is_clipped(bits: int) -> bool:
    """Whether ranges of groups of so many bits are searched."""
    return 1 << bits <= CLIPPED_LEVELS + 1


def symmetric_zero(scale: Tensor, bits: int | Tensor) -> Tensor:
    """The zero of symmetric groups, ``-(2^bits - 1) / 2 * scale`` in float32."""
    return _symmetric_zero(scale.float(), _levels(bits, scale.device))


def _symmetric_zero(scale: Tensor, levels: Tensor) -> Tensor:
    return -0.5 * levels * scale


def _quantize_symmetric(x: Tensor, levels: Tensor, *, clip: bool, unbiased: bool, dtype: torch.dtype) -> Affine:
    top = x.abs().amax(-1, keepdim=True)
    best = _quantize_about_0(x, top, levels, dtype)
    best_error = _squared_error(x, best)
    for factor in SYMMETRIC_FACTORS[1:] if clip else ():
        best, best_error = _better(
            x, best, best_error, _quantize_about_0(x, factor * top, levels, dtype), levels <= CLIPPED_LEVELS
        )
    if not unbiased:
        return best
    power = x.square().sum(-1, keepdim=True)
    overlap = (x * dequantize(*best)).sum(-1, keepdim=True)
    scale = torch.where(best.scale > 0, storable(best.scale * _gain(power, overlap), dtype), best.scale)
    return Affine(best.codes, scale, _symmetric_zero(scale, levels))


def _quantize_about_0(x: Tensor, top: Tensor, levels: Tensor, dtype: torch.dtype) -> Affine:
    scale = storable(2 * top / levels, dtype)
    return _encode(x, scale, _symmetric_zero(scale, levels), levels)


def _search_clip(x: Tensor, low: Tensor, high: Tensor, levels: Tensor, best: Affine, dtype: torch.dtype) -> Affine:
    best_error = _squared_error(x, best)
    middle, half = (low + high) / 2, (high - low) / 2
    for factor in CLIP_FACTORS[1:]:
        candidate = _quantize_range(x, middle - factor * half, middle + factor * half, levels, dtype)
        best, best_error = _better(x, best, best_error, candidate, levels <= CLIPPED_LEVELS)
    return best


def _better(x: Tensor, best: Affine, best_error: Tensor, candidate: Affine, allowed: Tensor) -> tuple[Affine, Tensor]:
    """The one with the smaller error, group by group where it is ``allowed``, and that error."""
    error = _squared_error(x, candidate)
    better = (error < best_error) & allowed
    chosen = Affine(*(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)))
    return chosen, torch.where(better, error, best_error)


def _stretch(x: Tensor, q: Affine, dtype: torch.dtype) -> Affine:
    restored = dequantize(*q)
    mean, restored_mean = x.mean(-1, keepdim=True), restored.mean(-1, keepdim=True)
    centred = x - mean
    power = centred.square().sum(-1, keepdim=True)
    overlap = (centred * (restored - restored_mean)).sum(-1, keepdim=True)
    gain = _gain(power, overlap)
    zero = mean + gain * (q.zero - restored_mean)
    varies = q.scale > 0
    return Affine(
        q.codes,
        torch.where(varies, storable(q.scale * gain, dtype), q.scale),
        torch.where(varies, storable(zero, dtype), q.zero),
    )


def _gain(power: Tensor, overlap: Tensor) -> Tensor:
    """The stretch that undoes shrinkage."""
    return torch.where(overlap > 0, power / overlap, 1.0).clamp(*GAINS)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``codes * scale + zero`` in float32; the three broadcast against each other."""
    return torch.addcmul(zero.float(), codes.to(torch.float32), scale.float())


def step_size(low: Tensor, high: Tensor, bits: int | Tensor) -> Tensor:
    """``(high - low) / (2^bits - 1)``: the distance of two neighbouring codes."""
    return (high - low) / _levels(bits, low.device)


def _levels(bits: int | Tensor, device: torch.device) -> Tensor:
    # Integers: a power of two that comes out a hair low would cut the highest code off.
    return ((1 << torch.as_tensor(bits, device=device, dtype=torch.int32)) - 1).float()


def _quantize_range(x: Tensor, low: Tensor, high: Tensor, levels: Tensor, dtype: torch.dtype) -> Affine:
    zero = _round_down(low, dtype)
    # `zero` was rounded down, so the range never turns negative and its top stays reachable.
    return _encode(x, storable((high - zero) / levels, dtype), zero, levels)


def _encode(x: Tensor, scale: Tensor, zero: Tensor, levels: Tensor) -> Affine:
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    codes = ((x - zero) * inverse).round_().clamp_(min=0).minimum(levels)
    return Affine(codes.to(torch.uint8), scale, zero)


def storable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in float32, rounded to what ``dtype`` can hold, its ends included."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()


def _round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return x
    info = torch.finfo(dtype)
    rounded = storable(x, dtype)
    # One unit in the last place below, by a float32 step that is at least that unit and less than two.
    below = storable(rounded - (rounded.abs() * info.eps).clamp(min=info.tiny * info.eps), dtype)
    return torch.where(rounded > x, below, rounded)


def _squared_error(x: Tensor, q: Affine) -> Tensor:
    return (dequantize(q.codes, q.scale, q.zero) - x).square_().sum(-1, keepdim=True)
