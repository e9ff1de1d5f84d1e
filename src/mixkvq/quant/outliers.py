"""Dense and sparse: a few numbers of every head and page are kept as they are, and no range has to reach to them.

KVQuant (arXiv 2401.18079) keeps the outermost 1% of each channel of keys, by thresholds that were calibrated, and of
each token of values. Here every head has the same number in every page, so that pages keep their size: those that lie
farthest from their group's median, in mean distances of the group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Outliers(NamedTuple):
    """``at [N, Hkv, k]`` int64, places ``token * D + channel`` in a block, rising; ``values``, the numbers there."""

    at: Tensor
    values: Tensor


def take_outliers(x: Tensor, count: int, *, dim: int, group: int) -> tuple[Tensor, Outliers | None]:
    """Take ``count`` numbers out of every head of blocks ``x [N, Hkv, R, D]``.

    Args:
        dim: 2 or 3, along which ``group`` neighbours share a scale.

    Returns:
        ``x`` with the median of the group where an outlier was, and the outliers; None for a count of 0.
    """
    if not count:
        return x, None
    grouped = x.float().unflatten(dim, (-1, group))
    median = grouped.median(dim + 1, keepdim=True).values
    distance = (grouped - median).abs()
    usual = distance.mean(dim + 1, keepdim=True)
    far = torch.where(usual > 0, distance / usual, 0).flatten(dim, dim + 1).flatten(2)
    at = far.topk(count, dim=-1).indices.sort(-1).values
    numbers = x.flatten(2)
    inside = median.expand_as(grouped).flatten(dim, dim + 1).flatten(2).gather(2, at).to(x.dtype)
    return numbers.scatter(2, at, inside).view_as(x), Outliers(at, numbers.gather(2, at))


def put_outliers(x: Tensor, outliers: Outliers) -> Tensor:
    """Put them back into ``x [N, Hkv, R, D]`` float32."""
    return x.flatten(2).scatter(2, outliers.at, outliers.values.float()).view_as(x)
