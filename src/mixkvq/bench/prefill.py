"""Time to read a long prompt, ours against a BF16 cache, in turn in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from mixkvq.adapters.transformers import NAME, MixKVQStaticCache
from mixkvq.bench import BF16
from mixkvq.bench.decoding import text_config
from mixkvq.bench.generate import free_memory
from mixkvq.config import MixKVQConfig
from mixkvq.models import attention


@dataclass(frozen=True)
class PrefillRow:
    """One cache and prompt length.

    Attributes:
        cache: preset, or ``"bf16"``: transformers' DynamicCache with SDPA attention.
        batch, context: sequences, and tokens of each.
        seconds: median time of one forward pass over the prompts.
        tokens_per_second: read, of all sequences together.
        time_ratio: against BF16.
        peak_bytes: most memory in use at once, weights included; 0 on a CPU.
    """

    cache: str
    batch: int
    context: int
    seconds: float
    tokens_per_second: float
    time_ratio: float
    peak_bytes: int


@torch.inference_mode()
def bench_prefill(
    model: PreTrainedModel,
    points: Sequence[tuple[int, int]],
    caches: Mapping[str, MixKVQConfig],
    *,
    repeats: int = 5,
    advance: Callable[[str], None] = lambda _: None,
) -> list[PrefillRow]:
    """Read random prompts with every cache at every ``(batch, context)``.

    Args:
        caches: configurations by the name to report.
        repeats: timed prompts, after one that is not timed.
        advance: called with what was just done.
    """
    rows: list[PrefillRow] = []
    for batch, context in points:
        names = [BF16, *caches]
        times: dict[str, list[float]] = {name: [] for name in names}
        peaks = dict.fromkeys(names, 0)
        for turn in range(1 + repeats):
            tokens = torch.randint(text_config(model).vocab_size, (batch, context), device=model.device)
            for name in names:
                free_memory()
                cache, implementation = _empty(model, name, caches, tokens)
                seconds, peaks[name] = _read(model, cache, implementation, tokens)
                del cache
                if turn:
                    times[name].append(seconds)
                advance(f"{batch} x {context:,}: {name}")
        median = {name: statistics.median(times[name]) for name in names}
        rows += [
            PrefillRow(
                cache=name,
                batch=batch,
                context=context,
                seconds=median[name],
                tokens_per_second=batch * context / median[name],
                time_ratio=median[name] / median[BF16],
                peak_bytes=peaks[name],
            )
            for name in names
        ]
    return rows


def _empty(model: PreTrainedModel, name: str, caches: Mapping[str, MixKVQConfig], tokens: Tensor) -> tuple[Cache, str]:
    """A fresh cache, and the attention that goes with it."""
    if name == BF16:
        return DynamicCache(config=model.config), "sdpa"
    room = tokens.shape[0] * caches[name].residual_length
    return MixKVQStaticCache(model.config, caches[name], max_tokens=tokens.numel() + room), NAME


def _read(model: PreTrainedModel, cache: Cache, implementation: str, tokens: Tensor) -> tuple[float, int]:
    """Seconds of one pass, and the most bytes in use at once."""
    on_gpu = model.device.type == "cuda"
    with attention(model, implementation):
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() if on_gpu else 0
