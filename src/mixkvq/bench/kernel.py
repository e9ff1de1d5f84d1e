"""Attention of one decode step of one layer, ours against the fastest over a BF16 cache, in one run on one GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixkvq.bench import BF16
from mixkvq.bench.baseline import sdpa_contenders, split_kv_attention, tuned
from mixkvq.bench.synthetic import PackedBlocks, bytes_read, dense_filled, filled_tensors, random_tokens
from mixkvq.bench.timing import Call, Timer, relative_error
from mixkvq.config import MixKVQConfig
from mixkvq.kernels.decode import decode_attention, fastest_kernel
from mixkvq.kernels.reference import attention
from mixkvq.quant.salience import QueryStatistics

#: The largest relative error of an output vector that counts as the right result.
ERROR_LIMIT = 0.05
#: What our kernels' names begin with.
OURS = "mixkvq"


class WrongResultError(RuntimeError):
    """A kernel that is measured computes something else."""


@dataclass(frozen=True)
class KernelShape:
    """``batch`` sequences of ``context`` tokens, the new one included."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    context: int


@dataclass(frozen=True)
class KernelRow:
    """One kernel at one shape.

    Attributes:
        cache: preset, or ``"bf16"``.
        kernel: what ran.
        batch, kv_heads, group, head_dim, context: :class:`KernelShape`.
        time_us: median time of one call, with a cold level-2 cache.
        bytes_read: of the cache, from the sizes of its tensors.
        gb_per_s: bytes read per time.
        copy_gb_per_s: the card's rate in the same run, of a copy of a gigabyte, bytes read and written.
        copy_share: ``gb_per_s`` of it.
        speed_up: time of the fastest BF16 kernel over this one's.
        error: largest relative error of an output vector, against float32 over the dequantized cache.
    """

    cache: str
    kernel: str
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    context: int
    time_us: float
    bytes_read: int
    gb_per_s: float
    copy_gb_per_s: float
    copy_share: float
    speed_up: float
    error: float


@dataclass(frozen=True)
class _Contender:
    cache: str
    kernel: str
    call: Callable[[], Tensor]
    bytes_read: int
    error: float


@torch.inference_mode()
def bench_kernel(
    shapes: Sequence[KernelShape],
    caches: Mapping[str, MixKVQConfig],
    *,
    kernel: str = "auto",
    repeats: int = 60,
    device: torch.device | str = "cuda",
    timer: Timer | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> list[KernelRow]:
    """Time one decode step of attention at every shape.

    Args:
        caches: configurations by the name to report.
        kernel: which of ours; see :func:`mixkvq.kernels.decode.decode_attention`.
        repeats: timed calls of each contender.
        device, timer: a CPU serves for tests.
        advance: called with what was just done.

    Raises:
        WrongResultError: a kernel's result is not the reference's.
    """
    device = torch.device(device)
    timer = timer or Timer(device)
    copy_rate = timer.copy_rate() if device.type == "cuda" else timer.copy_rate(1 << 20, 3)
    rows: list[KernelRow] = []
    packed: dict[tuple[str, int, int, int], PackedBlocks] = {}
    for shape in shapes:
        contenders = _bf16_contenders(shape, timer)
        advance(f"{shape.batch} x {shape.context:,}: BF16")
        for name, config in caches.items():
            heads = {"group": shape.group, "kv_heads": shape.kv_heads, "dim": shape.head_dim}
            key = name, shape.group, shape.kv_heads, shape.head_dim
            if key not in packed:
                packed[key] = PackedBlocks(config, **heads, dtype=torch.bfloat16, device=device)
            contenders.append(_packed_contender(shape, name, packed[key], kernel))
            advance(f"{shape.batch} x {shape.context:,}: {name}")
        calls: dict[str, Call] = {str(i): contender.call for i, contender in enumerate(contenders)}
        eager = [name for name, contender in zip(calls, contenders, strict=True) if contender.kernel == f"{OURS} torch"]
        times = timer.medians(calls, repeats, eager=eager)
        rows += _rows(shape, contenders, [times[name] for name in calls], copy_rate)
        advance(f"{shape.batch} x {shape.context:,}: timed")
    return rows


def _rows(
    shape: KernelShape, contenders: Sequence[_Contender], times: Sequence[float], copy_rate: float
) -> list[KernelRow]:
    fastest = min(time for time, contender in zip(times, contenders, strict=True) if contender.cache == BF16)
    return [
        KernelRow(
            cache=contender.cache,
            kernel=contender.kernel,
            **vars(shape),
            time_us=1e6 * time,
            bytes_read=contender.bytes_read,
            gb_per_s=1e-9 * contender.bytes_read / time,
            copy_gb_per_s=1e-9 * copy_rate,
            copy_share=contender.bytes_read / time / copy_rate,
            speed_up=fastest / time,
            error=contender.error,
        )
        for contender, time in zip(contenders, times, strict=True)
    ]


def _bf16_contenders(shape: KernelShape, timer: Timer) -> list[_Contender]:
    tokens = random_tokens(
        shape.batch,
        shape.context,
        group=shape.group,
        kv_heads=shape.kv_heads,
        dim=shape.head_dim,
        dtype=torch.bfloat16,
        device=timer.device,
        queries=1,
    )
    query, keys, values = tokens.query, tokens.keys, tokens.values
    scaling = shape.head_dim**-0.5
    lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=timer.device)
    calls: dict[str, Callable[[], Tensor]] = dict(sdpa_contenders(query, keys, values, scaling))
    best = tuned(query, keys, values, lengths, scaling=scaling, timer=timer)
    split_kv = functools.partial(split_kv_attention, query, keys, values, lengths, scaling=scaling, config=best)
    calls[f"Triton split-KV ({best})"] = split_kv
    expected = [_reference(query[row], keys[row], values[row], scaling) for row in _sample(shape)]
    return [
        _Contender(BF16, name, call, keys.nbytes + values.nbytes, _checked(name, call, expected, shape))
        for name, call in calls.items()
    ]


def _packed_contender(shape: KernelShape, name: str, blocks: PackedBlocks, kernel: str) -> _Contender:
    """One decode step as the static cache takes it: the new token is stored and the query statistics are updated."""
    stored, device = shape.context - 1, blocks.pages.device
    cache = filled_tensors(blocks, shape.batch, stored)
    new = random_tokens(
        shape.batch,
        1,
        group=shape.group,
        kv_heads=shape.kv_heads,
        dim=shape.head_dim,
        dtype=torch.bfloat16,
        device=device,
    )
    statistics = None
    if blocks.policy.uses_queries:
        statistics = QueryStatistics(shape.batch, shape.kv_heads, shape.head_dim, device)
    scaling = shape.head_dim**-0.5
    call = functools.partial(
        decode_attention,
        new.query,
        new.keys,
        new.values,
        cache,
        scaling=scaling,
        append=True,
        statistics=statistics,
        kernel=kernel,
    )
    expected, filled = [], dense_filled(cache, stored)
    for row in _sample(shape):
        keys, values = blocks.content(cache.table[row])
        dense_keys, dense_values = cache.dense_keys[row, :, :filled], cache.dense_values[row, :, :filled]
        keys = torch.cat([keys, dense_keys.float(), new.keys[row].float()], 1)
        values = torch.cat([values, dense_values.float(), new.values[row].float()], 1)
        expected.append(_reference(new.query[row], keys, values, scaling))
    error = _checked(name, call, expected, shape)
    ran = fastest_kernel(new.query, cache) if kernel == "auto" else kernel
    return _Contender(name, f"{OURS} {ran}", call, bytes_read(cache, stored), error)


def _sample(shape: KernelShape) -> list[int]:
    """The sequences whose result is checked."""
    return sorted({0, shape.batch - 1})


def _reference(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """One sequence in float32, a KV head at a time, to bound memory."""
    group = query.shape[0] // keys.shape[0]
    visible = torch.ones(1, keys.shape[1], dtype=torch.bool, device=query.device)
    heads = zip(query.split(group), keys.split(1), values.split(1), strict=True)
    return torch.cat([attention(q, k, v, visible, scaling=scaling) for q, k, v in heads])


def _checked(name: str, call: Callable[[], Tensor], expected: Sequence[Tensor], shape: KernelShape) -> float:
    output = call()
    errors = [relative_error(output[row], want) for row, want in zip(_sample(shape), expected, strict=True)]
    if not max(errors) < ERROR_LIMIT:
        raise WrongResultError(
            f"'{name}' at {shape} differs from the reference by {max(errors):.2g} of an output vector's length; up to "
            f"{ERROR_LIMIT} is rounding. Its time means nothing: run the tests of that kernel on this machine."
        )
    return max(errors)
