"""Time of one decode step and bytes held, against the stock cache, side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from mixkvq.adapters.transformers import NAME, MixKVQCache
from mixkvq.adapters.transformers.cache import held_tensors
from mixkvq.config import MixKVQConfig
from mixkvq.models import attention

STOCK = "stock"
#: Untimed steps before the timed ones.
WARM_UP = 4


@dataclass(frozen=True)
class DecodeRow:
    """One cache at one context length.

    Attributes:
        cache: preset, or ``"stock"``: transformers' DynamicCache with SDPA attention.
        context: tokens in the cache at the last timed step.
        dtype: the model's type.
        step_ms: median time of one decode step of the whole model.
        time_ratio: against stock; the median of the ratios of neighbouring steps.
        bytes_held: by the cache, everything counted.
        bytes_ratio: of a 16-bit cache's bytes to these: how many times smaller this one is.
    """

    cache: str
    context: int
    dtype: str
    step_ms: float
    time_ratio: float
    bytes_held: int
    bytes_ratio: float


@torch.inference_mode()
def bench_decode(
    model: PreTrainedModel,
    tokens: Tensor,
    caches: Mapping[str, MixKVQConfig],
    steps: int = 20,
    advance: Callable[[str], None] = lambda _: None,
) -> list[DecodeRow]:
    """Fill caches with the same tokens, then time decode steps of all of them in turn.

    Args:
        model: any that :class:`MixKVQCache` supports.
        tokens: ``[T]``, the context; the timed steps are its last tokens.
        caches: configurations by the name to report.
        steps: timed steps of each cache.
        advance: called with what was just done.
    """
    tokens = tokens.to(model.device)
    prompt = len(tokens) - steps - WARM_UP
    if prompt < 1:
        raise ValueError(f"A context of {len(tokens)} tokens leaves no prompt before {steps + WARM_UP} steps.")
    runs: dict[str, Cache] = {STOCK: DynamicCache(config=model.config)}
    runs.update({name: MixKVQCache(model.config, config) for name, config in caches.items()})
    for name, cache in runs.items():
        _step(model, name, cache, tokens[:prompt])
        advance(f"{len(tokens):,} tokens: prompt, {name}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(prompt, len(tokens)):
        for name, cache in runs.items():
            times[name].append(_step(model, name, cache, tokens[i : i + 1]))
        advance(f"{len(tokens):,} tokens: steps")
    times = {name: all_times[WARM_UP:] for name, all_times in times.items()}
    bf16 = _stock_elements(runs[STOCK]) * 2
    rows = []
    for name, cache in runs.items():
        held = cache.memory().total if isinstance(cache, MixKVQCache) else _stock_bytes(cache)
        ratios = [ours / stock for ours, stock in zip(times[name], times[STOCK], strict=True)]
        rows.append(
            DecodeRow(
                cache=name,
                context=len(tokens),
                dtype=str(model.dtype).removeprefix("torch."),
                step_ms=1e3 * statistics.median(times[name]),
                time_ratio=statistics.median(ratios),
                bytes_held=held,
                bytes_ratio=bf16 / held,
            )
        )
    return rows


def _step(model: PreTrainedModel, name: str, cache: Cache, tokens: Tensor) -> float:
    with attention(model, "sdpa" if name == STOCK else NAME):
        _wait(model)
        start = time.perf_counter()
        model(tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        _wait(model)
        return time.perf_counter() - start


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _stock_tensors(cache: Cache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in held_tensors(layer)]


def _stock_bytes(cache: Cache) -> int:
    return sum(tensor.nbytes for tensor in _stock_tensors(cache))


def _stock_elements(cache: Cache) -> int:
    return sum(tensor.numel() for tensor in _stock_tensors(cache))
