"""From a block of keys and values to codes: what a policy's plan is carried out with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixkvq.quant.affine import quantize
from mixkvq.quant.feedback import Feedback, quantize_with_feedback
from mixkvq.quant.rotation import rotate

#: The width that stands for "not quantized": the channel is kept in the model's own type.
DENSE_BITS = 16


@dataclass(frozen=True)
class QuantizedKeys:
    """Codes of N blocks of keys.

    Attributes:
        codes: ``[N, Hkv, R, D]`` uint8, at each channel's own width; 0 in dense channels.
        scale, zero: ``[N, Hkv, R / G, D]`` float32, 0 in dense channels.
        bits: ``[N, Hkv, D]`` uint8, each channel's width.
        dense: ``[N, Hkv, R, D]``, the keys themselves, of which dense channels are taken.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: Tensor
    dense: Tensor


@dataclass(frozen=True)
class QuantizedValues:
    """Codes of N blocks of values, in the rotated basis if the cache rotates values.

    Attributes:
        codes: ``[N, Hkv, R, D]`` uint8.
        scale, zero: ``[N, Hkv, R, groups]`` float32.
        dense: ``[N, Hkv, R, D]``, the values themselves, for a cache that does not quantize them.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    dense: Tensor


def quantize_keys(
    keys: Tensor,
    bits: Tensor,
    *,
    group: int,
    clip: bool,
    unbiased: bool,
    param_dtype: torch.dtype,
    feedback: Feedback | None = None,
) -> QuantizedKeys:
    """Quantize keys ``[N, Hkv, R, D]`` per channel, in groups of ``group`` tokens, at ``bits [N, Hkv, D]``.

    With ``feedback`` channels make up for each other's errors; without, each is rounded for itself.
    """
    dense = bits == DENSE_BITS
    grouped = keys.transpose(2, 3).unflatten(3, (-1, group))  # [N, Hkv, D, R / G, G]
    widths = bits.masked_fill(dense, 1)
    if feedback is None:
        q = quantize(grouped, widths[..., None, None], clip=clip, unbiased=unbiased, param_dtype=param_dtype)
    else:
        q = quantize_with_feedback(
            grouped, widths, dense, feedback, clip=clip, unbiased=unbiased, param_dtype=param_dtype
        )
    off = dense[:, :, None, :]
    return QuantizedKeys(
        codes=q.codes.flatten(3).transpose(2, 3).masked_fill(off, 0),
        scale=q.scale.squeeze(-1).transpose(2, 3).masked_fill(off, 0),
        zero=q.zero.squeeze(-1).transpose(2, 3).masked_fill(off, 0),
        bits=bits,
        dense=keys,
    )


def quantize_values(
    values: Tensor,
    bits: int,
    *,
    groups: int,
    clip: bool,
    unbiased: bool,
    symmetric: bool = False,
    rotation: bool,
    param_dtype: torch.dtype,
) -> QuantizedValues:
    """Quantize values ``[N, Hkv, R, D]`` per token, in ``groups`` equal parts of the channels."""
    basis = rotate(values) if rotation else values
    grouped = basis.unflatten(3, (groups, -1))
    q = quantize(grouped, min(bits, 8), clip=clip, unbiased=unbiased, symmetric=symmetric, param_dtype=param_dtype)
    return QuantizedValues(codes=q.codes.flatten(3), scale=q.scale.squeeze(-1), zero=q.zero.squeeze(-1), dense=values)
