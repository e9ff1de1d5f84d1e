"""How many long texts fit into a GPU at once, found by really holding them, and how fast they are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mixkvq.bench import BF16
from mixkvq.bench.generate import Contender, contenders, free_memory, measure, split
from mixkvq.bench.shapes import weight_bytes
from mixkvq.config import MixKVQConfig

#: Bytes that "all of the GPU's memory" leaves to libraries that do not ask torch for theirs.
HEADROOM = 10**9
#: Share of the batch that is given up when a graph does not fit where a step did.
STEP_BACK = 0.02


@dataclass(frozen=True)
class CapacityRow:
    """One cache at the largest batch that fits.

    Attributes:
        cache: preset, or ``"bf16"``.
        kernel: what attention runs.
        context: tokens of each sequence.
        memory: bytes that weights, cache and everything else were allowed to take.
        batch: the most sequences.
        batch_ratio: of the BF16 cache's batch.
        tokens_per_second: of all sequences together, at that batch.
        speed_up: of the BF16 cache's tokens per second at its own largest batch.
        step_ms: mean time of a step.
        peak_bytes, cache_bytes, weight_bytes, flush_share: see :class:`mixkvq.bench.generate.GenerateRow`.
    """

    cache: str
    kernel: str
    context: int
    memory: int
    batch: int
    batch_ratio: float
    tokens_per_second: float
    speed_up: float
    step_ms: float
    peak_bytes: int
    cache_bytes: int
    weight_bytes: int
    flush_share: float | None


class NoRoomError(RuntimeError):
    """Not even one sequence fits."""


@torch.inference_mode()
def bench_capacity(
    model: PreTrainedModel,
    context: int,
    caches: Mapping[str, MixKVQConfig],
    *,
    memory: int | None = None,
    steps: int = 64,
    advance: Callable[[str], None] = lambda _: None,
) -> list[CapacityRow]:
    """Find the largest batch of every cache, and time it there.

    Args:
        context: tokens of each sequence.
        caches: configurations by the name to report.
        memory: bytes to stay within; None is all that is free on the GPU, and what torch has taken, but a gigabyte.
        steps: timed steps.
        advance: called with what was just done.

    Raises:
        NoRoomError: not even one sequence fits.
    """
    if memory is None:
        memory = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved(model.device) - HEADROOM
    everyone = contenders(model, caches, steps)
    # SDPA over a StaticCache copies all keys and values, so that the other BF16 contender holds more.
    everyone = everyone[:1] + [who for who in everyone if who.cache != BF16]
    rows: list[CapacityRow] = []
    with memory_limit(model.device, memory):
        for who in everyone:
            batch = largest(lambda n, who=who: _fits(model, who, n, context, memory))  # type: ignore[misc]
            if batch == 0:
                raise NoRoomError(
                    f"Not even one sequence of {context:,} tokens fits into {memory / 1e9:.1f} GB beside "
                    f"{weight_bytes(model) / 1e9:.1f} GB of weights with the cache '{who.cache}'. Give a shorter "
                    "--context, more --memory, or a smaller --shape."
                )
            advance(f"{who.cache}: {batch} sequences")
            rows.append(_timed(model, who, batch, context, memory, profile=who.cache in caches))
            advance(f"{who.cache}: timed")
    first = rows[0]
    return [
        dataclasses.replace(
            row,
            batch_ratio=row.batch / first.batch,
            speed_up=row.tokens_per_second / first.tokens_per_second,
        )
        for row in rows
    ]


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where whatever is smaller does too; 0 if 1 does not. By doubling and halving."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(model: PreTrainedModel, who: Contender, batch: int, context: int, memory: int) -> bool:
    """Whether so many sequences can be held and take a step. On a CPU only weights and cache are counted."""
    free_memory()
    try:
        decoding = who.make(batch, *split(context, who.steps))
        decoding.step()
        if decoding.on_gpu:
            torch.cuda.synchronize()
            return True
        return weight_bytes(model) + decoding.cache_bytes() <= memory
    except torch.OutOfMemoryError:
        return False


def _timed(
    model: PreTrainedModel, who: Contender, batch: int, context: int, memory: int, *, profile: bool
) -> CapacityRow:
    while (measured := measure(who.make, batch, context, who.steps, profile=profile)) is None:
        batch -= max(1, int(STEP_BACK * batch))
        if batch < 1:
            raise NoRoomError(f"A CUDA graph of one step with the cache '{who.cache}' does not fit into memory.")
    return CapacityRow(
        cache=who.cache,
        kernel=who.kernel,
        context=context,
        memory=memory,
        batch=batch,
        batch_ratio=1.0,
        tokens_per_second=batch / measured.step_seconds,
        speed_up=1.0,
        step_ms=1e3 * measured.step_seconds,
        peak_bytes=measured.peak_bytes,
        cache_bytes=measured.cache_bytes,
        weight_bytes=weight_bytes(model),
        flush_share=measured.flush_share,
    )


@contextmanager
def memory_limit(device: torch.device, memory: int) -> Iterator[None]:
    """Let torch take so many bytes of the GPU at most; no limit on a CPU."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(memory / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
