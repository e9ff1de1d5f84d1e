"""Attention that hands out what each token got of it: plain torch, on any device, one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mixkvq.kernels.partial import MAX_LOGITS
from mixkvq.kernels.reference import attention_weights


def attention_mass(query: Tensor, keys: Tensor, visible: Tensor, shares: Tensor, **options: object) -> Tensor:
    """What each token got of the attention of some queries, mean over the query heads.

    Args:
        query, keys, visible: see :func:`mixkvq.kernels.reference.attention`, as for ``options``.
        shares: ``[L]``, what each query counts for.

    Returns:
        ``[T]`` float32.
    """
    mass = torch.zeros(keys.shape[1], device=keys.device)
    for part, weights in _weights(query, keys, visible, options):
        mass += shares[part] @ weights.mean(0)
    return mass


def weighed_attention(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, shares: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """:func:`mixkvq.kernels.reference.attention` ``[Hq, L, D]`` and :func:`attention_mass` ``[T]`` in one go."""
    mass = torch.zeros(keys.shape[1], device=keys.device)
    repeated = values.float().repeat_interleave(query.shape[0] // keys.shape[0], dim=0)
    outputs = []
    for part, weights in _weights(query, keys, visible, options):
        outputs.append(weights @ repeated)
        mass += shares[part] @ weights.mean(0)
    return torch.cat(outputs, 1), mass


def _weights(query: Tensor, keys: Tensor, visible: Tensor, options: dict) -> Iterator[tuple[slice, Tensor]]:
    """Softmax weights ``[Hq, l, T]`` of some queries after the other, so that their number stays bounded."""
    size = max(1, MAX_LOGITS // max(1, query.shape[0] * keys.shape[1]))
    for start in range(0, query.shape[1], size):
        part = slice(start, start + size)
        yield part, attention_weights(query[:, part], keys, visible[part], **options)
