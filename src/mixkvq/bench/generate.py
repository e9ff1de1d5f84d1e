"""Tokens per second and peak memory of decoding a whole model, ours against BF16, in one run.

Every contender goes through the same loop: transformers' model, one forward pass a token, the most likely token fed
back; on a GPU captured as one CUDA graph.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mixkvq.bench import BF16
from mixkvq.bench.decoding import Decoding, PackedDecoding, RandomBlocks, SplitKVDecoding, StockDecoding
from mixkvq.bench.profiling import flush_share
from mixkvq.bench.shapes import weight_bytes
from mixkvq.bench.timing import WARM_UP, captured
from mixkvq.config import MixKVQConfig

#: Timed steps of transformers' SDPA over a StaticCache, which takes many times as long as the others.
STOCK_STEPS = 16
#: Steps that every sequence flushes one block in.
PROFILED = 128


@dataclass(frozen=True)
class GenerateRow:
    """One cache at one batch and context.

    Attributes:
        cache: preset, or ``"bf16"``.
        kernel: what attention runs.
        batch, context: sequences, and tokens of each when the timed steps begin.
        steps: timed steps; 0 if memory ran out, and every figure is 0 then.
        step_ms: mean time of a step.
        tokens_per_second: of all sequences together.
        speed_up: tokens per second over those of the fastest BF16 cache; 0 if none of them fits into memory.
        peak_bytes: most memory in use at once, weights included; 0 on a CPU.
        cache_bytes: held by the cache.
        weight_bytes: of the model.
        flush_share: of the GPU's time, what choosing widths, quantizing and packing take, all steps counted; None
            where it was not measured. (Query statistics are part of the attention kernel.)
    """

    cache: str
    kernel: str
    batch: int
    context: int
    steps: int
    step_ms: float
    tokens_per_second: float
    speed_up: float
    peak_bytes: int
    cache_bytes: int
    weight_bytes: int
    flush_share: float | None


@dataclass(frozen=True)
class Measured:
    """What decoding took: seconds a step, most bytes in use at once, bytes of the cache, share of flushes."""

    steps: int
    step_seconds: float
    peak_bytes: int
    cache_bytes: int
    flush_share: float | None = None


#: Makes a decoding from the batch, the tokens stored, and the tokens that may follow.
Maker = Callable[[int, int, int], Decoding]


@dataclass(frozen=True)
class Contender:
    """A cache to measure: its name, the kernel that attention runs, how it is made, and how many steps are timed."""

    cache: str
    kernel: str
    make: Maker
    steps: int


def contenders(model: PreTrainedModel, caches: Mapping[str, MixKVQConfig], steps: int) -> list[Contender]:
    """BF16 and the given caches; the split-KV kernel is Triton's and takes a GPU."""
    found = [Contender(BF16, "SDPA", functools.partial(StockDecoding, model), min(steps, STOCK_STEPS))]
    if model.device.type == "cuda":
        found.insert(0, Contender(BF16, "Triton split-KV", functools.partial(SplitKVDecoding, model), steps))
    for name, config in caches.items():
        make = functools.partial(PackedDecoding, model, RandomBlocks(model, config))
        found.append(Contender(name, "mixkvq", make, steps))
    return found


@torch.inference_mode()
def bench_generate(
    model: PreTrainedModel,
    points: Sequence[tuple[int, int]],
    caches: Mapping[str, MixKVQConfig],
    *,
    steps: int = 128,
    advance: Callable[[str], None] = lambda _: None,
) -> list[GenerateRow]:
    """Decode with every cache at every ``(batch, context)``.

    Args:
        caches: configurations by the name to report.
        steps: timed steps.
        advance: called with what was just done.
    """
    rows: list[GenerateRow] = []
    everyone = contenders(model, caches, steps)
    for batch, context in points:
        measured = []
        for contender in everyone:
            profile = contender.cache in caches
            measured.append(measure(contender.make, batch, context, contender.steps, profile=profile))
            advance(f"{batch} x {context:,}: {contender.cache}, {contender.kernel}")
        rows += rows_of(model, batch, context, everyone, measured)
    return rows


def rows_of(
    model: PreTrainedModel,
    batch: int,
    context: int,
    everyone: Sequence[Contender],
    measured: Sequence[Measured | None],
) -> list[GenerateRow]:
    """Rows of one batch and context; None where memory ran out."""
    pairs = list(zip(everyone, measured, strict=True))
    fastest = max((batch / m.step_seconds for who, m in pairs if m is not None and who.cache == BF16), default=None)
    rows = []
    for who, what in pairs:
        m = what or Measured(0, math.inf, 0, 0)
        speed = batch / m.step_seconds
        rows.append(
            GenerateRow(
                cache=who.cache,
                kernel=who.kernel,
                batch=batch,
                context=context,
                steps=m.steps,
                step_ms=1e3 * m.step_seconds if m.steps else 0.0,
                tokens_per_second=speed,
                speed_up=speed / fastest if fastest else 0.0,
                peak_bytes=m.peak_bytes,
                cache_bytes=m.cache_bytes,
                weight_bytes=weight_bytes(model),
                flush_share=m.flush_share,
            )
        )
    return rows


def split(context: int, steps: int) -> tuple[int, int]:
    """Tokens to store, and room to leave, for steps that begin with ``context`` tokens after the warm-up's own."""
    stored = max(context - WARM_UP, 1)
    return stored, WARM_UP + steps + PROFILED + 1


def measure(make: Maker, batch: int, context: int, steps: int, *, profile: bool = False) -> Measured | None:
    """Time ``steps`` steps that begin with ``context`` tokens of each sequence; None if memory runs out.

    Args:
        profile: find the share of flushes as well, on a GPU.
    """
    free_memory()
    try:
        decoding = make(batch, *split(context, steps))
        decoding.prepare()
        return _measure_on_gpu(decoding, steps, profile) if decoding.on_gpu else _measure_on_cpu(decoding, steps)
    except torch.OutOfMemoryError:
        return None
    finally:
        decoding = None  # type: ignore[assignment]
        free_memory()


def _measure_on_cpu(decoding: Decoding, steps: int) -> Measured:
    for _ in range(WARM_UP):
        decoding.step()
    start = time.perf_counter()
    for _ in range(steps):
        decoding.step()
    return Measured(steps, (time.perf_counter() - start) / steps, 0, decoding.cache_bytes())


def _measure_on_gpu(decoding: Decoding, steps: int, profile: bool) -> Measured:
    torch.cuda.reset_peak_memory_stats()
    replay = captured(decoding.step)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        replay()
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    share = flush_share(replay, PROFILED) if profile else None
    return Measured(steps, 1e-3 * start.elapsed_time(end) / steps, peak, decoding.cache_bytes(), share)


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
