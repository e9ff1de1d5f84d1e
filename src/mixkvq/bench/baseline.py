"""What a quantized cache is compared with: decode attention over a BF16 cache, as fast as it gets.

PyTorch's SDPA (flash and cuDNN) and a split-KV kernel in Triton (as FlashDecoding): the query heads of a KV head share
one tile, the context is split over the multiprocessors, and the parts are merged by log-sum-exp.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixkvq.bench.timing import Timer, captured
from mixkvq.kernels.device import multiprocessors
from mixkvq.kernels.triton.codes import product

#: Rows of a matrix product's smallest tile.
TILE = 16


@dataclass(frozen=True)
class SplitConfig:
    """How the split-KV kernel is launched.

    Attributes:
        block: tokens of one step of the loop.
        warps, stages: of a program: its warps, and its loads in flight.
        programs: of each multiprocessor; together they make the number of splits.
    """

    block: int
    warps: int
    stages: int
    programs: int

    def __str__(self) -> str:
        return f"{self.block} tokens, {self.warps} warps, {self.stages} stages, {self.programs} a multiprocessor"


#: What :func:`tuned` chooses from.
SPLIT_CONFIGS = (
    SplitConfig(32, 4, 4, 4),
    SplitConfig(64, 2, 4, 2),
    SplitConfig(64, 4, 3, 2),
    SplitConfig(64, 4, 3, 3),
    SplitConfig(64, 4, 3, 6),
    SplitConfig(64, 4, 4, 2),
    SplitConfig(128, 4, 2, 2),
    SplitConfig(128, 4, 2, 3),
    SplitConfig(128, 4, 3, 1),
    SplitConfig(128, 8, 3, 1),
)


@triton.jit
def _attend_split(
    query, keys, values, lengths, outputs, tops, masses, factor,
    key_batch, key_head, key_token, value_batch, value_head, value_token, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split's tokens of one KV head: unnormalized output, running maximum and mass of every query head."""
    split, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + batch).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    start = split * share
    stop = tl.minimum(start + share, length)
    rows, tokens, channels = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, PADDED)
    whole = channels < D
    owner = batch * tl.num_programs(1) + head
    at = query + (owner * GROUP + rows)[:, None] * D + channels[None, :]
    q = tl.load(at, mask=(rows < GROUP)[:, None] & whole[None, :], other=0.0)
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, PADDED], tl.float32)
    for first in range(start, stop, BLOCK):
        token = first + tokens
        inside = token < stop
        place = token.to(tl.int64)
        k = tl.load(
            keys + place[None, :] * key_token + channels[:, None], mask=inside[None, :] & whole[:, None], other=0.0
        )
        v = tl.load(
            values + place[:, None] * value_token + channels[None, :], mask=inside[:, None] & whole[None, :], other=0.0
        )
        logits = tl.where(inside[None, :], product(q, k) * factor, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        decay = tl.exp2(top - new_top)
        output = product(weights.to(v.dtype), v, output * decay[:, None])
        mass = mass * decay + tl.sum(weights, 1)
        top = new_top
    part = (owner * splits + split) * GROUP + rows
    real = rows < GROUP
    tl.store(tops + part, top, mask=real)
    tl.store(masses + part, mass, mask=real)
    tl.store(outputs + part[:, None] * D + channels[None, :], output, mask=real[:, None] & whole[None, :])


@triton.jit
def _merge_splits(
    outputs, tops, masses, result, splits,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One query head: the parts of all splits, and the division by their common mass."""
    head = tl.program_id(0).to(tl.int64)
    first = head // GROUP * splits * GROUP + head % GROUP
    split, channels = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    there, whole = split < splits, channels < D
    parts_top = tl.load(tops + first + split * GROUP, mask=there, other=float("-inf"))
    top = tl.max(parts_top, 0)
    mass = tl.sum(tl.exp2(parts_top - top) * tl.load(masses + first + split * GROUP, mask=there, other=0.0), 0)
    total = tl.zeros([AT_ONCE, PADDED], tl.float32)
    for start in range(0, splits, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        part = first + some * GROUP
        weight = tl.exp2(tl.load(tops + part, mask=some < splits, other=float("-inf")) - top)
        seen = (some < splits)[:, None] & whole[None, :]
        total += weight[:, None] * tl.load(outputs + part[:, None] * D + channels[None, :], mask=seen, other=0.0)
    output = tl.sum(total, 0) / mass
    tl.store(result + head * D + channels, output.to(result.dtype.element_ty), mask=whole)


def split_kv_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, scaling: float, config: SplitConfig
) -> Tensor:
    """Attention of one new token over a cache in 16 bits, without looking at ``lengths`` on the host.

    Args:
        query: ``[B, Hq, 1, D]``.
        keys, values: ``[B, Hkv, T, D]``, last dimension contiguous.
        lengths: ``[B]`` integers, tokens to read of each sequence, at least 1.
        scaling: factor of the logits.
        config: how it is launched.

    Returns:
        ``[B, Hq, 1, D]``.
    """
    batch, heads, _, dim = query.shape
    kv_heads, capacity = keys.shape[1:3]
    group = heads // kv_heads
    blocks = -(-capacity // config.block)
    splits = max(1, min(blocks, config.programs * multiprocessors(query.device) // (batch * kv_heads)))
    outputs = query.new_empty(batch, kv_heads, splits, group, dim, dtype=torch.float32)
    tops, masses = query.new_empty(2, batch, kv_heads, splits, group, dtype=torch.float32)
    padded = triton.next_power_of_2(dim)
    _attend_split[(splits, kv_heads, batch)](
        query.contiguous(), keys, values, lengths, outputs, tops, masses, scaling * math.log2(math.e),
        *keys.stride()[:3], *values.stride()[:3], splits,
        GROUP=group, ROWS=max(TILE, triton.next_power_of_2(group)), D=dim, PADDED=padded, BLOCK=config.block,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    _merge_splits[(batch * heads,)](
        outputs, tops, masses, result, splits,
        GROUP=group, D=dim, PADDED=padded, SPLITS=triton.next_power_of_2(splits), AT_ONCE=TILE, num_warps=4,
    )  # fmt: skip
    return result


def tuned(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, scaling: float, timer: Timer, repeats: int = 10
) -> SplitConfig:
    """The fastest of :data:`SPLIT_CONFIGS` for these tensors."""
    calls = {
        str(i): lambda config=config: split_kv_attention(query, keys, values, lengths, scaling=scaling, config=config)  # type: ignore[misc]
        for i, config in enumerate(SPLIT_CONFIGS)
    }
    times = timer.medians(calls, repeats)
    return SPLIT_CONFIGS[int(min(times, key=lambda name: times[name]))]


def sdpa_contenders(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> dict[str, Callable[[], Tensor]]:
    """PyTorch's fused kernels over full caches, by name: with its own grouped queries, and with each group as one tile.

    As one tile: the query heads of a KV head are passed as so many query tokens of that head, which all see
    everything. Kernels that this machine or shape does not have are left out.
    """
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3])
    backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    contenders: dict[str, Callable[[], Tensor]] = {}
    for name, backend in backends.items():
        for variant, rows in ((", group as tile", grouped), (", grouped queries", query)):

            def call(backend: SDPBackend = backend, rows: Tensor = rows) -> Tensor:
                grouped_queries = rows.shape[1] != keys.shape[1]
                with sdpa_kernel(backend):
                    output = F.scaled_dot_product_attention(
                        rows, keys, values, scale=scaling, enable_gqa=grouped_queries
                    )
                return output.reshape(query.shape)

            if _runs(call, query.device):
                contenders[name + variant] = call
    return contenders


def _runs(call: Callable[[], Tensor], device: torch.device) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # which say why not
            call()
            if device.type == "cuda":
                captured(call)
    except RuntimeError:  # "No available kernel"
        return False
    return True
