"""Non-uniform levels: a table of what codes stand for, the same for all groups of a layer.

A group's scale and zero are those of its whole range, as for uniform codes, and a code ``c`` stands for ``levels[c]``
steps instead of ``c``: ``x~ = levels[c] * scale + zero``. Levels are fitted to data by k-means in one dimension,
weighed by how much each number matters (KVQuant, arXiv 2401.18079).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.quant.affine import Affine

#: 2^bits rising numbers from 0 to 2^bits - 1.
Levels = tuple[float, ...]
#: Bins of a step in which numbers are counted when levels are fitted.
BINS_PER_STEP = 128
#: Rounds of k-means; it stops where nothing moves.
ROUNDS = 100


def to_levels(x: Tensor, q: Affine, levels: Levels) -> Affine:
    """``q``, a quantization of ``x [..., G]`` with its whole range, with codes of the nearest levels instead."""
    codes = nearest(steps(x, q.scale, q.zero), levels)
    return q._replace(codes=codes)


def steps(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """``(x - zero) / scale`` in float32, 0 where the scale is."""
    return (x.float() - zero) * torch.where(scale > 0, 1 / scale, 0)


def nearest(at: Tensor, levels: Levels) -> Tensor:
    """The code whose level is nearest, uint8 of any shape; the lower one at equal distance."""
    table = torch.tensor(levels, device=at.device)
    return torch.bucketize(at.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)


def positions(codes: Tensor, levels: Levels | None) -> Tensor:
    """What codes stand for, in steps of their group; None is uniform, where they are that themselves."""
    return codes if levels is None else torch.tensor(levels, device=codes.device)[codes.long()]


def new_histogram(bits: int) -> Tensor:
    """An empty one for :func:`count`, float64."""
    return torch.zeros(((1 << bits) - 1) * BINS_PER_STEP, dtype=torch.float64)


def count(histogram: Tensor, at: Tensor, weight: Tensor) -> None:
    """Add numbers at ``at`` steps, each with its weight, both of the same shape."""
    bins = (at.flatten() * BINS_PER_STEP).long().clamp(0, len(histogram) - 1)
    histogram.index_add_(0, bins.cpu(), weight.flatten().double().cpu())


def fit_levels(histogram: Tensor, bits: int) -> Levels:
    """The levels with the least weighed squared distance to what was counted, from uniform ones by k-means.

    A level that nothing is near stays where it is.
    """
    centres = (torch.arange(len(histogram), dtype=torch.float64) + 0.5) / BINS_PER_STEP
    levels = torch.arange(1 << bits, dtype=torch.float64)
    for _ in range(ROUNDS):
        owner = torch.bucketize(centres, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, owner, histogram)
        total = torch.zeros_like(levels).index_add_(0, owner, histogram * centres)
        moved = torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    return tuple(round(level, 4) for level in levels.tolist())
