"""Decide the widths of key channels on the device: the plans of the built-in policies, in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixkvq.config import PROMOTED_BITS
from mixkvq.kernels.triton.affine import nearest
from mixkvq.kernels.triton.format import TRITON_TYPES
from mixkvq.kernels.triton.pack import check_sources
from mixkvq.policies.base import PlanRule
from mixkvq.store.layout import PageLayout

#: Tokens whose loads are under way at the same time.
UNROLL = 8


@dataclass(frozen=True)
class PlanFormat:
    """A rule and a layout as the constants that the kernel is compiled for.

    Attributes:
        widths, taus: the thresholds' tiers, rising; empty with a budget.
        count: promoted channels of a ranking; a ranking is all heads' channels, or with ``per_head`` one head's.
        source: the keys' type, in which "magnitude" is computed.
    """

    heads: int
    dim: int
    tokens: int
    group: int
    step: int
    base_bits: int
    promoted_bits: int
    score: str
    widths: tuple[int, ...]
    taus: tuple[float, ...]
    count: int
    per_head: bool
    source: tl.dtype
    tile_heads: int
    tile_dim: int

    @property
    def warps(self) -> int:
        return min(max(self.tile_heads * self.tile_dim // 256, 1), 16)


def plan_blocks(
    keys: Tensor,
    rows: Tensor,
    starts: Tensor,
    active: Tensor,
    total: Tensor | None,
    count: Tensor | None,
    rule: PlanRule,
    layout: PageLayout,
) -> Tensor:
    """Each channel's width in N blocks of R tokens, as the policy's ``plan`` in torch; channels that tie by number.

    Args:
        keys: ``[X, Hkv, T, D]`` float32, float16 or bfloat16, the last dimension contiguous.
        rows, starts: ``[N]`` int32, each block's row of ``keys`` and its first token.
        active: ``[N]`` bool, uint8 or int32; a block whose flag is 0 is left out, and its widths are undefined.
        total, count: ``[X, Hkv, D]`` and ``[X]`` float32, the rows' query statistics
            (:class:`~mixkvq.quant.salience.QueryStatistics`); only the score "salience" needs them.
        rule: the policy's.
        layout: the page format.

    Returns:
        ``[N, Hkv, D]`` uint8.

    Raises:
        ValueError: statistics are missing, or the tensors are not laid out as described.
    """
    check_sources(keys=keys)
    shape = (len(rows), layout.kv_heads, layout.key_dim)
    if rule.score == "none":
        return torch.full(shape, layout.key_bits, dtype=torch.uint8, device=keys.device)
    if rule.score == "salience" and (total is None or count is None):
        raise ValueError("A plan by salience needs the query statistics: give total [X, Hkv, D] and count [X].")
    form = _plan_format(
        layout,
        rule.score,
        tuple(sorted((rule.thresholds or {}).items())),
        rule.count(layout.kv_heads, layout.key_dim, layout.key_bits),
        rule.scope == "head",
        keys.dtype,
    )
    bits = torch.empty(shape, dtype=torch.uint8, device=keys.device)
    if len(rows):
        with torch.cuda.device_of(keys):
            _plan[(len(rows),)](
                keys,
                *keys.stride()[:3],
                rows,
                starts,
                active.view(torch.uint8) if active.dtype == torch.bool else active,
                keys if total is None else total,
                keys if count is None else count,
                bits,
                form,
                num_warps=form.warps,
            )
    return bits


@lru_cache(maxsize=64)
def _plan_format(
    layout: PageLayout,
    score: str,
    thresholds: tuple[tuple[int, float], ...],
    count: int,
    per_head: bool,
    source: torch.dtype,
) -> PlanFormat:
    group = layout.tokens if score == "magnitude" else layout.key_group
    return PlanFormat(
        heads=layout.kv_heads,
        dim=layout.key_dim,
        tokens=layout.tokens,
        group=group,
        step=next(step for step in range(UNROLL, 0, -1) if group % step == 0),
        base_bits=layout.key_bits,
        promoted_bits=PROMOTED_BITS,
        score=score,
        widths=tuple(width for width, _ in thresholds),
        taus=tuple(tau for _, tau in thresholds),
        count=count,
        per_head=per_head,
        source=TRITON_TYPES[source],
        tile_heads=triton.next_power_of_2(layout.kv_heads),
        tile_dim=triton.next_power_of_2(layout.key_dim),
    )


@triton.jit
def _plan(
    keys,
    key_row,
    key_head,
    key_token,
    rows,
    starts,
    active,
    total,
    count,
    bits,
    form: tl.constexpr,
):
    """A program plans one block: the tile ``[Hkv, D]`` stays in registers while the tokens go by."""
    block = tl.program_id(0)
    if tl.load(active + block) == 0:
        return
    row, start = tl.load(rows + block).to(tl.int64), tl.load(starts + block).to(tl.int64)
    head, channel = tl.arange(0, form.tile_heads)[:, None], tl.arange(0, form.tile_dim)[None, :]
    inside = (head < form.heads) & (channel < form.dim)
    place = keys + row * key_row + start * key_token + head.to(tl.int64) * key_head + channel
    if form.score == "magnitude":
        score = magnitude(place, key_token, inside, form)
    else:
        score = sensitivity(place, key_token, inside, form)
    if form.score == "salience":
        seen = tl.load(count + row)
        sums = tl.load(total + (row * form.heads + head) * form.dim + channel, mask=inside, other=0.0)
        importance = tl.div_rn(sums, tl.zeros_like(sums) + tl.maximum(seen, 1.0))
        score = tl.where(seen > 0, importance, 1.0) * score

    width = tl.full(score.shape, form.base_bits, tl.int32)
    if len(form.widths) > 0:
        for i in tl.static_range(len(form.widths)):
            width = tl.where(score > form.taus[i], form.widths[i], width)
    elif form.per_head:
        width = tl.where(top(score, inside, form.count), form.promoted_bits, width)
    else:
        ranking: tl.constexpr = form.tile_heads * form.tile_dim
        promoted = top(tl.reshape(score, [1, ranking]), tl.reshape(inside, [1, ranking]), form.count)
        width = tl.where(tl.reshape(promoted, [form.tile_heads, form.tile_dim]), form.promoted_bits, width)
    place = bits + (block * form.heads + head) * form.dim + channel
    tl.store(place, width.to(tl.uint8), mask=inside)


@triton.jit
def sensitivity(place, stride, inside, form: tl.constexpr):
    """``S_d``, as :func:`mixkvq.quant.salience.sensitivity`."""
    unroll: tl.constexpr = form.step
    steps = tl.zeros(inside.shape, tl.float32)
    levels = tl.full(inside.shape, (1 << form.base_bits) - 1, tl.float32)
    for first in range(0, form.tokens, form.group):
        low, high = tl.full(inside.shape, float("inf"), tl.float32), tl.full(inside.shape, float("-inf"), tl.float32)
        spoiled = tl.zeros(inside.shape, tl.int1)
        for token in range(first, first + form.group, unroll):
            for i in tl.static_range(unroll):
                x = tl.load(place + (token + i) * stride, mask=inside, other=0.0).to(tl.float32)
                low, high = tl.minimum(low, x), tl.maximum(high, x)
                spoiled = spoiled | (x != x)
        # Least and greatest pass over NaN, and a block that holds one must not look harmless.
        steps += tl.where(spoiled, float("nan"), tl.div_rn(high - low, levels))
    return tl.div_rn(steps, tl.full(inside.shape, form.tokens // form.group, tl.float32))


@triton.jit
def magnitude(place, stride, inside, form: tl.constexpr):
    """Mean ``|K|``, rounded to the keys' own type."""
    unroll: tl.constexpr = form.step
    sums = tl.zeros(inside.shape, tl.float32)
    for token in range(0, form.tokens, unroll):
        for i in tl.static_range(unroll):
            sums += tl.abs(tl.load(place + (token + i) * stride, mask=inside, other=0.0).to(tl.float32))
    return nearest(tl.div_rn(sums, tl.full(inside.shape, form.tokens, tl.float32)), form.source)


@triton.jit
def top(score, inside, count: tl.constexpr):
    """The ``count`` highest scores of each row of ``[rows, channels]``; NaN is highest, and ties go by number.

    Scores are not negative, so their order is that of their bits: the least score that is promoted is found bit by bit.
    """
    order = tl.where(inside, score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    least = tl.zeros([score.shape[0], 1], tl.int32)
    for i in range(31):
        higher = least | (1 << (30 - i))
        enough = tl.sum((order >= higher).to(tl.int32), axis=1, keep_dims=True) >= count
        least = tl.where(enough, higher, least)
    above, equal = order > least, order == least
    room = count - tl.sum(above.to(tl.int32), axis=1, keep_dims=True)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room))
