"""From a block of keys and values to codes: what a policy's plan is carried out with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixkvq.quant.affine import Affine, quantize
from mixkvq.quant.feedback import Feedback, quantize_with_feedback
from mixkvq.quant.levels import Levels, to_levels
from mixkvq.quant.outliers import Outliers
from mixkvq.quant.rotation import rotate

#: The width that stands for "not quantized": the channel is kept in the model's own type.
DENSE_BITS = 16


@dataclass(frozen=True)
class QuantizedKeys:
    """Codes of N blocks of keys.

    Attributes:
        codes: ``[N, Hkv, R, D]`` uint8, at each channel's own width; 0 in dense channels. In the rotated basis if the
            cache rotates keys.
        scale, zero: ``[N, Hkv, R / G, D]`` float32, 0 in dense channels; ``[N, Hkv, R, groups]`` where they were
            quantized per token.
        bits: ``[N, Hkv, D]`` uint8, each channel's width.
        dense: ``[N, Hkv, R, D]``, the keys themselves, of which dense channels are taken.
        outliers: numbers that are kept as they are; None without.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: Tensor
    dense: Tensor
    outliers: Outliers | None = None


@dataclass(frozen=True)
class QuantizedValues:
    """Codes of N blocks of values, in the rotated basis if the cache rotates values.

    Attributes:
        codes: ``[N, Hkv, R, D]`` uint8.
        scale, zero: ``[N, Hkv, R, groups]`` float32.
        dense: ``[N, Hkv, R, D]``, the values themselves, for a cache that does not quantize them.
        outliers: numbers that are kept as they are; None without.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    dense: Tensor
    outliers: Outliers | None = None


def quantize_keys(
    keys: Tensor,
    bits: Tensor,
    *,
    group: int,
    clip: bool,
    unbiased: bool,
    param_dtype: torch.dtype,
    feedback: Feedback | None = None,
    levels: Levels | None = None,
) -> QuantizedKeys:
    """Quantize keys ``[N, Hkv, R, D]`` per channel, in groups of ``group`` tokens, at ``bits [N, Hkv, D]``.

    With ``feedback`` channels make up for each other's errors; without, each is rounded for itself.
    """
    dense = bits == DENSE_BITS
    grouped = keys.transpose(2, 3).unflatten(3, (-1, group))  # [N, Hkv, D, R / G, G]
    widths = bits.masked_fill(dense, 1)
    if feedback is None:
        q = _quantize(grouped, widths[..., None, None], levels, clip=clip, unbiased=unbiased, param_dtype=param_dtype)
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
    levels: Levels | None = None,
) -> QuantizedValues:
    """Quantize values ``[N, Hkv, R, D]`` per token, in ``groups`` equal parts of the channels."""
    q = _quantize_tokens(
        values,
        bits,
        groups=groups,
        rotation=rotation,
        clip=clip,
        unbiased=unbiased,
        symmetric=symmetric,
        param_dtype=param_dtype,
        levels=levels,
    )
    return QuantizedValues(q.codes, q.scale, q.zero, dense=values)


def quantize_keys_per_token(
    keys: Tensor,
    bits: Tensor,
    width: int,
    *,
    groups: int,
    clip: bool,
    unbiased: bool,
    rotation: bool,
    param_dtype: torch.dtype,
    levels: Levels | None = None,
) -> QuantizedKeys:
    """Quantize keys ``[N, Hkv, R, D]`` as :func:`quantize_values` does values.

    Every channel has the same ``width``, which is what ``bits [N, Hkv, D]`` says, too.
    """
    q = _quantize_tokens(
        keys,
        width,
        groups=groups,
        rotation=rotation,
        clip=clip,
        unbiased=unbiased,
        param_dtype=param_dtype,
        levels=levels,
    )
    return QuantizedKeys(q.codes, q.scale, q.zero, bits, dense=keys)


def _quantize_tokens(
    x: Tensor, bits: int, *, groups: int, rotation: bool, levels: Levels | None, **options: Any
) -> Affine:
    """Codes ``[N, Hkv, R, D]``, scale and zero ``[N, Hkv, R, groups]``; of widths that are not quantized, unused."""
    basis = rotate(x) if rotation else x
    q = _quantize(basis.unflatten(3, (groups, -1)), min(bits, 8), levels, **options)
    return Affine(q.codes.flatten(3), q.scale.squeeze(-1), q.zero.squeeze(-1))


def _quantize(grouped: Tensor, bits: int | Tensor, levels: Levels | None, **options: Any) -> Affine:
    q = quantize(grouped, bits, **options)
    return q if levels is None else to_levels(grouped, q, levels)
