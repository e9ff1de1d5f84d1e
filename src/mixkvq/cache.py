"""One attention layer's quantized cache, free of any framework: policy, quantizer, store and kernels put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixkvq.config import MixKVQConfig
from mixkvq.kernels.decode import MAX_STEP, decode_attention, has_kernels, torch_attention
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.policies import Policy, policy_class
from mixkvq.quant.salience import QueryStatistics
from mixkvq.recipe import Recipe, page_layout
from mixkvq.store import MemoryReport, PagedStore
from mixkvq.store.appending import FullBlocks
from mixkvq.store.packing import chunk_counts
from mixkvq.store.tensors import CacheTensors
from mixkvq.surroundings import ordinary_tensors

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


class LayerCache:
    """Keys and values of one attention layer, and attention over them.

    Args:
        config: how they are stored.
        policy: who decides the bits; shared by the layers.
        like: the first step, for shapes, type and device.
    """

    @ordinary_tensors
    def __init__(self, config: MixKVQConfig, policy: Policy, like: Step) -> None:
        self.config = config
        self.policy = policy
        batch, kv_heads, _, key_dim = like.keys.shape
        self.recipe = Recipe.of(config, policy, kv_heads, key_dim, like.values.shape[3], like.keys.dtype)
        device = like.keys.device
        self.store = PagedStore(self.recipe.layout, batch, config.sinks, device)
        self.statistics = QueryStatistics(batch, kv_heads, key_dim, device) if policy.uses_queries else None

    @property
    def rotated(self) -> bool:
        """Whether values are stored rotated."""
        return self.recipe.rotated

    @ordinary_tensors
    def tensors(self) -> CacheTensors:
        """What is stored, as kernels on a device read it."""
        return self.store.cache_tensors(self.rotated)

    @ordinary_tensors
    def append(self, step: Step) -> None:
        """Store new tokens, and quantize the blocks that they complete."""
        if self.statistics is not None:
            self.statistics.update(step.query, step.real)
        for blocks in self.store.append(step.keys, step.values, step.real):
            size = max(1, MAX_QUANTIZED // blocks.keys[0].numel())
            for start in range(0, len(blocks.sequences), size):
                part = slice(start, start + size)
                self._flush(FullBlocks(blocks.keys[part], blocks.values[part], blocks.sequences[part]))

    def _flush(self, blocks: FullBlocks) -> None:
        """Plan, quantize, pack."""
        device = blocks.keys.device
        importance = None
        if self.statistics is not None:
            importance = self.statistics.importance(torch.tensor(blocks.sequences, device=device))
        bits = self.recipe.plan(blocks.keys, importance)
        if not has_kernels(device):
            self.store.write(blocks.sequences, *self.recipe.quantize(blocks.keys, blocks.values, bits))
            return
        count = len(blocks.sequences)
        pages, run_starts = self.store.reserve(blocks.sequences, self._chunks(bits))
        rows = torch.arange(count, dtype=torch.int32, device=device)
        starts = torch.zeros_like(rows)
        pools = self.store.pages.data, self.store.chunk_data
        self.recipe.pack_on_device(blocks.keys, blocks.values, rows, starts, bits, pages, run_starts, *pools)

    def _chunks(self, bits: Tensor) -> dict[int, list[int]]:
        """Chunks of each block by promoted width; waits for the device only where data decides."""
        fixed = self.recipe.chunks_per_page
        if fixed is not None:
            return {width: [count] * len(bits) for width, count in fixed.items()}
        layout = self.recipe.layout
        return {width: chunk_counts(layout, width, bits).tolist() for width in layout.promoted_bits}

    @ordinary_tensors
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
        tensors = step.query, step.keys, step.values
        if visible is None and step.length <= MAX_STEP and has_kernels(step.query.device):
            return decode_attention(*tensors, self.tensors(), scaling=scaling, softcap=softcap, sinks=sinks)
        pages, dense = self.store.packed(), self.store.dense()
        return torch_attention(
            *tensors, pages, dense, visible, rotated=self.rotated, scaling=scaling, softcap=softcap, sinks=sinks
        )

    @ordinary_tensors
    def select(self, rows: Sequence[int]) -> None:
        """Keep the given batch rows, in that order, repeats allowed."""
        self.store.select(rows)
        if self.statistics is not None:
            self.statistics.select(torch.tensor(list(rows), dtype=torch.long, device=self.store.device))

    @ordinary_tensors
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
