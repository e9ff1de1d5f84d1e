"""Symmetric INT8, as CONF-KV (arXiv 2605.24786) stores tokens outside its window.

``scale = max|x| / 127``, ``code = round(x / scale)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.quant.affine import storable

#: The largest code.
TOP = 127


def quantize_int8(x: Tensor, param_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize blocks of tokens per head and channel.

    Args:
        x: ``[..., T, D]``, each block's T tokens sharing a scale per channel.
        param_dtype: the type that scales are stored in. They are rounded to it before codes are computed.

    Returns:
        ``codes [..., T, D]`` int8 and ``scale [..., D]`` in ``param_dtype``; a channel of zeros has scale 0.
    """
    x = x.float()
    scale = storable(x.abs().amax(-2) / TOP, param_dtype)
    inverse = torch.where(scale > 0, 1 / scale, 0.0).unsqueeze(-2)
    codes = (x * inverse).round_().clamp_(-TOP, TOP).to(torch.int8)
    return codes, scale.to(param_dtype)
