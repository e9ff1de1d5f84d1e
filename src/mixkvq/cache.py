"""One attention layer's quantized cache, free of any framework: policy, quantizer, store and kernels put together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from mixkvq.config import MixKVQConfig
from mixkvq.kernels.packed import packed_attention
from mixkvq.kernels.partial import Partial, causal, dense_attention, merge, sink_rows
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.policies import KeyBlock, Policy, policy_class
from mixkvq.quant.block import DENSE_BITS, quantize_keys, quantize_values
from mixkvq.quant.rotation import rotate
from mixkvq.quant.salience import QueryStatistics
from mixkvq.store import MemoryReport, PagedStore, PageLayout
from mixkvq.store.paged import FullBlocks

P = ParamSpec("P")
T = TypeVar("T")

#: Numbers that are quantized at once when a long prompt is flushed, to bound memory.
MAX_QUANTIZED = 1 << 23


@dataclass(frozen=True)
class Step:
    """New tokens of one forward pass: ``query [B, Hq, L, D]``, ``keys, values [B, Hkv, L, D]`` after RoPE.

    ``real [B, L]`` bool is False at padding; None if all tokens are real.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    real: Tensor | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def tokens(self, start: int, stop: int) -> Step:
        """The tokens ``start`` to ``stop``."""
        real = None if self.real is None else self.real[:, start:stop]
        part = slice(start, stop)
        return Step(self.query[:, :, part], self.keys[:, :, part], self.values[:, :, part], real)

    def copy(self) -> Step:
        """The same tokens in memory of their own, outside any gradient."""
        query, keys, values = (x.detach().clone() for x in (self.query, self.keys, self.values))
        return Step(query, keys, values, self.real)


def page_layout(
    config: MixKVQConfig, policy: Policy, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> PageLayout:
    """The page format that a configuration leads to in a layer of the given shape."""
    return PageLayout(
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        tokens=config.residual_length,
        key_bits=config.key_bits,
        key_group=config.key_group,
        value_bits=config.value_bits,
        value_groups=config.value_groups(value_dim),
        promoted_bits=policy.promoted_bits,
        param_dtype=config.param_dtype,
        dense_dtype=dtype,
    )


def expected_bits(
    config: MixKVQConfig, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[float, float, bool]:
    """Honest bits per packed key and value element, as the page format has them.

    Returns:
        key bits, value bits, and whether these are final: a policy with thresholds promotes channels by the data, and
        key bits are then those without any.
    """
    policy = policy_class(config.policy)(config)
    layout = page_layout(config, policy, kv_heads, head_dim, head_dim, dtype)
    promoted = policy.promoted_channels(kv_heads, head_dim)
    page = MemoryReport(layout.part_bytes(promoted or {}))
    page.packed_keys = page.packed_values = kv_heads * layout.tokens * head_dim
    return page.key_bits, page.value_bits, promoted is not None


def _ordinary_tensors(method: Callable[P, T]) -> Callable[P, T]:
    """Run without gradients or autocast, and outside inference mode, whose tensors could not be written to later."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        # In this order: leaving inference mode switches gradients on again.
        with torch.inference_mode(False), torch.no_grad(), autocast_off():
            return method(*args, **kwargs)

    return run


@contextmanager
def autocast_off() -> Iterator[None]:
    """The cache computes in float32 whatever the model around it is cast to."""
    with torch.autocast("cpu", enabled=False):
        if not torch.cuda.is_available():
            yield
            return
        with torch.autocast("cuda", enabled=False):
            yield


class LayerCache:
    """Keys and values of one attention layer, and attention over them.

    Args:
        config: how they are stored.
        policy: who decides the bits; shared by the layers.
        like: the first step, for shapes, type and device.
    """

    @_ordinary_tensors
    def __init__(self, config: MixKVQConfig, policy: Policy, like: Step) -> None:
        self.config = config
        self.policy = policy
        batch, kv_heads, _, key_dim = like.keys.shape
        layout = page_layout(config, policy, kv_heads, key_dim, like.values.shape[3], like.keys.dtype)
        device = like.keys.device
        self.store = PagedStore(layout, batch, config.sinks, device)
        self.statistics = QueryStatistics(batch, kv_heads, key_dim, device) if policy.uses_queries else None

    @property
    def rotated(self) -> bool:
        """Whether values are stored rotated."""
        return self.config.value_rotation == "hadamard" and self.config.value_bits != DENSE_BITS

    @_ordinary_tensors
    def append(self, step: Step) -> None:
        """Store new tokens, and quantize the blocks that they complete."""
        if self.statistics is not None:
            self.statistics.update(step.query, step.real)
        for blocks in self.store.append(step.keys, step.values, step.real):
            size = max(1, MAX_QUANTIZED // blocks.keys[0].numel())
            for start in range(0, len(blocks.sequences), size):
                part = slice(start, start + size)
                self._flush(FullBlocks(blocks.keys[part], blocks.values[part], blocks.sequences[part]))

    def _check_plan(self, bits: Tensor, keys: Tensor) -> None:
        allowed = (self.config.key_bits, *self.policy.promoted_bits)
        wanted = torch.Size((*keys.shape[:2], keys.shape[3]))
        if bits.shape != wanted or bits.dtype != torch.uint8 or not set(bits.unique().tolist()) <= set(allowed):
            raise ValueError(
                f"The policy {type(self.policy).__name__} planned {bits.dtype} {list(bits.shape)} with the widths "
                f"{bits.unique().tolist()}; a plan is uint8 {list(wanted)}, of the widths {list(allowed)}."
            )

    def _flush(self, blocks: FullBlocks) -> None:
        """Plan, quantize, pack."""
        config = self.config
        importance = None
        if self.statistics is not None:
            importance = self.statistics.importance(torch.tensor(blocks.sequences, device=blocks.keys.device))
        bits = self.policy.plan(KeyBlock(blocks.keys, importance))
        self._check_plan(bits, blocks.keys)
        keys = quantize_keys(
            blocks.keys,
            bits,
            group=config.key_group,
            clip=config.key_clip,
            unbiased=config.key_unbiased,
            param_dtype=config.param_dtype,
        )
        values = quantize_values(
            blocks.values,
            config.value_bits,
            groups=self.store.layout.value_groups,
            clip=config.value_clip,
            unbiased=config.value_unbiased,
            rotation=self.rotated,
            param_dtype=config.param_dtype,
        )
        self.store.write(blocks.sequences, keys, values)

    @_ordinary_tensors
    def attend(
        self,
        step: Step,
        visible: Tensor | None,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new tokens over everything stored and over themselves.

        Args:
            step: the new tokens, not yet appended. Every stored token is visible to all of them.
            visible: bool ``[B or 1, L, L]``, which new token sees which; None is causal.
            scaling: factor of the logits.
            softcap, sinks: see :func:`mixkvq.kernels.reference.attention`.

        Returns:
            ``[B, Hq, L, D]`` in the queries' type.
        """
        store = self.store
        batch, heads, length, _ = step.query.shape
        kv_heads = store.layout.kv_heads
        query = (step.query.float() * scaling).unflatten(1, (kv_heads, heads // kv_heads))

        parts: list[Partial] = []
        pages = store.packed()
        if pages is not None:
            part = packed_attention(query.flatten(2, 3), pages, softcap)
            parts.append(Partial(rotate(part.output), part.lse) if self.rotated else part)
        parts.append(self._attend_dense(query, step, visible, softcap))

        output = merge(parts, sink_rows(sinks, kv_heads, length))
        return output.view(batch, heads, length, -1).to(step.query.dtype)

    def _attend_dense(self, query: Tensor, step: Step, visible: Tensor | None, softcap: float | None) -> Partial:
        """Attention over sinks, residual and the new tokens."""
        dense, length = self.store.dense(), step.length
        keys = torch.cat([dense.keys, step.keys.to(dense.keys.dtype)], 2)
        values = torch.cat([dense.values, step.values.to(dense.values.dtype)], 2)
        if length == 1 and dense.mask is None:
            return dense_attention(query, keys, values, None, softcap)
        device = step.keys.device
        if visible is None:
            visible = causal(length, length, device)[None]
        past = torch.ones(1, dense.keys.shape[2], dtype=torch.bool, device=device)
        if dense.mask is not None:
            past = dense.mask
        batch = max(past.shape[0], visible.shape[0])
        past = past[:, None, :].expand(batch, length, -1)
        seen = torch.cat([past, visible.expand(batch, -1, -1)], 2)[:, None, None]
        return dense_attention(query, keys, values, seen, softcap)

    @_ordinary_tensors
    def select(self, rows: Sequence[int]) -> None:
        """Keep the given batch rows, in that order, repeats allowed."""
        self.store.select(rows)
        if self.statistics is not None:
            self.statistics.select(torch.tensor(list(rows), dtype=torch.long, device=self.store.device))

    @_ordinary_tensors
    def crop(self, removed: Sequence[int]) -> None:
        """Remove the last ``removed[b]`` tokens of every sequence.

        Exact where they are in the residual. A cut through a page puts the page's remaining tokens back into the
        residual as they were stored: what quantization took from them does not come back. Query statistics keep
        what they have seen.
        """
        for row, count in enumerate(removed):
            if not count:
                continue
            length = self.store.lengths[row] - count
            restored = None
            if (cut := self.store.cut_page(row, length)) is not None:
                page, left = cut
                keys, values = dequantize_pages(self.store.only(page), 0, rotated=self.rotated)
                restored = keys[:, :left], values[:, :left]
            self.store.crop(row, length, restored)

    def memory(self) -> MemoryReport:
        """Bytes held, by part."""
        report = self.store.memory()
        if self.statistics is not None:
            report.parts["statistics"] = self.statistics.total.nbytes + self.statistics.count.nbytes
        return report
