"""Asymmetric uniform quantization of groups, with an optional search for the clipping range.

For a group ``x`` and ``b`` bits (method section "Preliminaries" of arXiv 2512.19206, after KIVI)::

    scale = (max x - min x) / (2^b - 1)
    zero  = min x
    code  = clamp(round((x - zero) / scale), 0, 2^b - 1)
    x~    = code * scale + zero

``scale`` and ``zero`` are rounded to the type they are stored in *before* the codes are computed, so the codes
make up for that rounding. A constant group has ``scale = 0`` and comes back exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: How far the range of a group is shrunk about its midpoint when a better clipping range is searched.
CLIP_FACTORS = (1.0, 0.92, 0.84, 0.76, 0.68)


class Affine(NamedTuple):
    """Codes of groups with what turns them back into numbers.

    ``codes`` has the shape of the input, type uint8; ``scale`` and ``zero`` are float32 holding values that the
    storage type represents exactly, with the group dimension reduced to 1.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(
    x: Tensor, bits: int | Tensor, *, clip: bool = False, param_dtype: torch.dtype = torch.float32
) -> Affine:
    """Quantize groups that lie along the last dimension.

    Args:
        x: ``[..., G]``, groups of ``G`` numbers.
        bits: 1 to 8, or an integer tensor that broadcasts against ``[..., 1]`` with a width for every group.
        clip: choose, per group, the range among :data:`CLIP_FACTORS` with the least squared error.
        param_dtype: the type in which scales and zeros will be stored.

    Returns:
        ``codes [..., G]`` uint8 and ``scale, zero [..., 1]`` float32.
    """
    x = x.float()
    levels = _levels(bits, x.device)
    low, high = x.aminmax(dim=-1, keepdim=True)
    best = _quantize_range(x, low, high, levels, param_dtype)
    if not clip:
        return best
    best_error = _squared_error(x, best)
    middle, half = (low + high) / 2, (high - low) / 2
    for factor in CLIP_FACTORS[1:]:
        candidate = _quantize_range(x, middle - factor * half, middle + factor * half, levels, param_dtype)
        error = _squared_error(x, candidate)
        better = error < best_error
        best = Affine(*(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)))
        best_error = torch.where(better, error, best_error)
    return best


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``codes * scale + zero`` in float32; the three broadcast against each other."""
    return torch.addcmul(zero.float(), codes.to(torch.float32), scale.float())


def step_size(low: Tensor, high: Tensor, bits: int | Tensor) -> Tensor:
    """``(high - low) / (2^bits - 1)``: the distance of two neighbouring codes."""
    return (high - low) / _levels(bits, low.device)


def _levels(bits: int | Tensor, device: torch.device) -> Tensor:
    return (2.0 ** torch.as_tensor(bits, device=device, dtype=torch.float32)) - 1


def _quantize_range(x: Tensor, low: Tensor, high: Tensor, levels: Tensor, dtype: torch.dtype) -> Affine:
    zero = _round_down(low, dtype)
    # `zero` was rounded down, so the range never turns negative and its top stays reachable.
    scale = _storable((high - zero) / levels, dtype)
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    codes = ((x - zero) * inverse).round_().clamp_(min=0).minimum(levels)
    return Affine(codes.to(torch.uint8), scale, zero)


def _storable(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()


def _round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return x
    info = torch.finfo(dtype)
    rounded = _storable(x, dtype)
    # One unit in the last place below, by a float32 step that is at least that unit and less than two.
    below = _storable(rounded - (rounded.abs() * info.eps).clamp(min=info.tiny * info.eps), dtype)
    return torch.where(rounded > x, below, rounded)


def _squared_error(x: Tensor, q: Affine) -> Tensor:
    return (dequantize(q.codes, q.scale, q.zero) - x).square_().sum(-1, keepdim=True)
