"""The cache of one layer, which grows with its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixkvq.config import MixKVQConfig
from mixkvq.kernels.decode import MAX_STEP, decode_attention, torch_attention
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers.recipe import MAX_QUANTIZED, LayerShape, Recipe
from mixkvq.layers.step import Step
from mixkvq.layers.surroundings import ordinary_tensors
from mixkvq.policies import Policy
from mixkvq.quant.rope import Rope
from mixkvq.quant.salience import SAMPLED_EVERY, QueryStatistics
from mixkvq.store import MemoryReport, PagedStore
from mixkvq.store.appending import FullBlocks
from mixkvq.store.packing import chunk_counts
from mixkvq.store.recent import RecentTokens
from mixkvq.store.tensors import CacheTensors


class LayerCache:
    """Keys and values of one attention layer, and attention over them.

    Args:
        config: how they are stored.
        policy: who decides the bits; shared by the layers.
        like: the first step, for shapes, type and device.
        rope: the layer's, with ``key_rope="before"``.
    """

    @ordinary_tensors
    def __init__(self, config: MixKVQConfig, policy: Policy, like: Step, rope: Rope | None = None) -> None:
        self.config = config
        self.policy = policy
        self.recipe = Recipe.of(config, policy, LayerShape.of(like.keys, like.values, rope))
        batch, device = like.keys.shape[0], like.keys.device
        self.recipe.warn_of_torch(device)
        recent = RecentTokens(policy.recent, config.recent_of)
        self.store = PagedStore(self.recipe.layout, batch, config.sinks, device, recent)
        self.statistics = self.recipe.new_statistics(batch, device)

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
        statistics = self._seen(step)
        for blocks in self.store.append(step.keys, step.values, step.real):
            size = max(1, MAX_QUANTIZED // blocks.keys[0].numel())
            for start in range(0, len(blocks.sequences), size):
                part = slice(start, start + size)
                self._flush(FullBlocks(blocks.keys[part], blocks.values[part], blocks.sequences[part]), statistics)

    def _seen(self, step: Step) -> QueryStatistics | None:
        """What is known of the queries, those of new tokens included, for the blocks that these complete."""
        if self.statistics is None:
            return None
        self.statistics.update(step.query, step.real)
        if step.length > 1 or any(length % SAMPLED_EVERY == 0 for length in self.store.lengths):
            self.statistics.sample(step.query, self.store.device_lengths(), step.real)
        return self.statistics.with_prompt(step.query, step.real)

    def _flush(self, blocks: FullBlocks, seen: QueryStatistics | None) -> None:
        """Plan, quantize, pack; ``seen`` has a row for every sequence of the batch."""
        device = blocks.keys.device
        statistics = None
        if seen is not None:
            statistics = seen.rows(torch.tensor(blocks.sequences, device=device))
        bits = self.recipe.plan(blocks.keys, statistics)
        if not self.recipe.packs_on(device):
            first = self.store.next_tokens(blocks.sequences)
            coded = self.recipe.quantize(blocks.keys, blocks.values, bits, statistics, first)
            self.store.write(blocks.sequences, *coded)
            return
        count = len(blocks.sequences)
        pages, run_starts = self.store.reserve(blocks.sequences, self._chunks(bits))
        rows = torch.arange(count, dtype=torch.int32, device=device)
        starts = torch.zeros_like(rows)
        pools = self.store.pages.data, self.store.chunk_data
        keys = self.recipe.move_on_device(blocks.keys, rows, starts, torch.ones_like(rows), bits, statistics)
        self.recipe.pack_on_device(keys, blocks.values, rows, starts, bits, pages, run_starts, *pools)

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
        if visible is None and step.length <= MAX_STEP and self.recipe.decodes_on(step.query.device):
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
            kept = torch.tensor(list(rows), dtype=torch.long, device=self.store.device)
            self.statistics = self.statistics.rows(kept)

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
                block, left = cut
                keys, values = dequantize_pages(self.store.only(row, block), 0, rotated=self.rotated)
                restored = keys[:, :left], values[:, :left]
            self.store.crop(row, length, restored)

    def memory(self) -> MemoryReport:
        """Bytes held, by part."""
        report = self.store.memory()
        if self.statistics is not None:
            report.parts["statistics"] = sum(tensor.nbytes for tensor in self.statistics.tensors())
        return report
