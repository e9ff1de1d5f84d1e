"""Caches full of random tokens, without the prompt that would fill them.

A few hundred distinct blocks are packed by a real cache, and their pages copied until there are enough: random codes,
scales and tiers, at a small part of the time that a prompt takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixkvq.config import ConfigError, MixKVQConfig
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers import LayerCache, Step
from mixkvq.policies import policy_class
from mixkvq.quant.rope import Rope
from mixkvq.store.books import blocks_of
from mixkvq.store.static import StaticStore
from mixkvq.store.tensors import CacheTensors
from mixkvq.store.view import PackedPages

#: Blocks that are packed; more pages than that are copies.
DISTINCT = 256
#: Bytes that one gather of pages may take, to fill memory to the brim.
COPIED_AT_ONCE = 1 << 28


def random_tokens(
    batch: int,
    length: int,
    *,
    group: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    queries: int | None = None,
) -> Step:
    """Random queries, keys and values. Key channels differ in scale and offset, as a model's do.

    Args:
        queries: tokens that have a query, the last ones; None is all.
    """
    spread = torch.logspace(-1, 0.7, dim, device=device)[torch.randperm(dim, device=device)]

    def randn(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, dim, dtype=dtype, device=device)

    # In place: at long contexts there may not be room for a copy.
    keys = randn(kv_heads, length).mul_(spread).add_(torch.randn(dim, device=device))
    query = randn(kv_heads * group, length if queries is None else queries)
    return Step(query, keys, randn(kv_heads, length))


class PackedBlocks:
    """Distinct blocks of one layer, packed as a cache of that configuration packs them.

    Args:
        config: the cache.
        group: query heads of a KV head.
        count: distinct blocks.

    Raises:
        ConfigError: a share of the context is kept out of the pages, which no kernel reads.
    """

    def __init__(
        self,
        config: MixKVQConfig,
        *,
        group: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        count: int = DISTINCT,
    ) -> None:
        self.config, self.count = config, count
        self.policy = policy_class(config.policy)(config)
        if self.policy.recent:
            raise ConfigError(
                f"No kernel reads a cache that keeps a share of the context out of its pages (recent="
                f"{self.policy.recent:g}). Set recent to 0, or measure it with mixkvq bench decode."
            )
        length = config.sinks + count * config.residual_length
        tokens = random_tokens(1, length, group=group, kv_heads=kv_heads, dim=dim, dtype=dtype, device=device)
        self.cache = LayerCache(config, self.policy, tokens, Rope.of_base(dim))
        self.cache.append(tokens)
        self.layout = self.cache.store.layout
        self.pages = self.cache.store.pages.data[self.cache.store.tables[0]]
        self.chunks = {bits: pool.data for bits, pool in self.cache.store.chunks.items()}

    def chunk_counts(self, bits: int, pages: int) -> Tensor:
        """``[pages]`` int64: chunks of one promoted width that each of so many copies has."""
        runs = self.layout.page.views(self.pages)[f"run_{bits}"]
        return runs[self._sources(pages), 1].long()

    def fill(self, pages: Tensor, chunks: dict[int, Tensor], first_chunk: dict[int, int]) -> None:
        """Write copies into all records of ``pages [N, nbytes]``, whose runs of chunks follow each other.

        Args:
            chunks: by promoted width, the pool ``[C, nbytes]``.
            first_chunk: by promoted width, where in its pool the first page's run is to start.
        """
        size = max(1, COPIED_AT_ONCE // self.layout.page.nbytes)
        next_chunk = dict(first_chunk)
        for start in range(0, len(pages), size):
            part = pages[start : start + size]
            sources = self._sources(len(pages))[start : start + size]
            part.copy_(self.pages[sources])
            fields = self.layout.page.views(part)
            for bits, pool in chunks.items():
                runs = fields[f"run_{bits}"]
                old, counts = runs[:, 0].long(), runs[:, 1].long()
                before = counts.cumsum(0) - counts
                total = int(counts.sum())
                index = (old - before).repeat_interleave(counts) + torch.arange(total, device=part.device)
                pool[next_chunk[bits] : next_chunk[bits] + total] = self.chunks[bits][index]
                runs[:, 0] = (before + next_chunk[bits]).to(runs.dtype)
                next_chunk[bits] += total

    def _sources(self, count: int) -> Tensor:
        return torch.arange(count, device=self.pages.device) % self.count

    def content(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv, N * R, D]`` float32 of a sequence whose pages are ``numbers [N]`` that :meth:`fill`
        wrote.
        """
        store = self.cache.store
        table = [store.tables[0][number % self.count] for number in numbers.tolist()]
        view = PackedPages.of(self.layout, [table], store.sinks, store.pages.data, self.chunks)
        if view is None:
            empty = torch.zeros(self.layout.kv_heads, 0, self.layout.key_dim, device=self.pages.device)
            return empty, empty
        return dequantize_pages(view, 0, rotated=self.cache.rotated)


def filled_tensors(blocks: PackedBlocks, batch: int, stored: int) -> CacheTensors:
    """A layer's cache with ``stored`` tokens of each of ``batch`` sequences, their pages in random order."""
    layout, sinks, device = blocks.layout, blocks.config.sinks, blocks.pages.device
    count = blocks_of(stored, sinks, layout.tokens)
    pages = torch.empty(batch * count, layout.page.nbytes, dtype=torch.uint8, device=device)
    chunks = {}
    for bits, record in layout.chunks.items():
        total = int(blocks.chunk_counts(bits, batch * count).sum())
        chunks[bits] = torch.empty(total, record.nbytes, dtype=torch.uint8, device=device)
    blocks.fill(pages, chunks, dict.fromkeys(chunks, 0))
    # Room for the step's own tokens, as a statically shaped cache has.
    dense = (batch, layout.kv_heads, sinks + layout.tokens + 8)
    return CacheTensors(
        layout=layout,
        sinks=sinks,
        rotated=blocks.cache.rotated,
        pages=pages,
        chunks=chunks,
        table=torch.randperm(batch * count, device=device).view(batch, count).to(torch.int32),
        lengths=torch.full((batch,), stored, dtype=torch.int32, device=device),
        dense_keys=torch.randn(*dense, layout.key_dim, dtype=layout.dense_dtype, device=device),
        dense_values=torch.randn(*dense, layout.value_dim, dtype=layout.dense_dtype, device=device),
    )


def dense_filled(cache: CacheTensors, stored: int) -> int:
    """Dense slots that a sequence of so many tokens fills."""
    return stored - blocks_of(stored, cache.sinks, cache.layout.tokens) * cache.layout.tokens


def bytes_read(cache: CacheTensors, stored: int) -> int:
    """Bytes of a cache of :func:`filled_tensors` that attention has to read: pages, chunks, filled dense slots."""
    filled = dense_filled(cache, stored)
    dense = sum(tensor[:, :, :filled].nbytes for tensor in (cache.dense_keys, cache.dense_values))
    return cache.pages.nbytes + sum(chunks.nbytes for chunks in cache.chunks.values()) + dense


def fill_store(store: StaticStore, blocks: PackedBlocks, stored: int) -> None:
    """Write ``stored`` random tokens of each sequence into a statically shaped cache, over whatever it holds."""
    batch, layers, sinks = store.shape.batch, store.shape.layers, store.shape.sinks
    capacity = store.pages.shape[1]
    count = blocks_of(stored, sinks, store.layout.tokens)
    used = batch * count
    taken = {bits: int(blocks.chunk_counts(bits, used).sum()) for bits in store.chunks}
    fixed = store.shape.chunks_per_page
    store.books.next_page.fill_(used)
    if fixed is None:
        store.next_chunk.copy_(torch.tensor([layers * taken[bits] for bits in store.layout.promoted_bits]))
        store.settled = False  # what it allocated before was a guess
        store.settle()
    for layer in range(layers):
        first = {bits: layer * (chunks if fixed is None else capacity * fixed[bits]) for bits, chunks in taken.items()}
        blocks.fill(store.pages[layer, :used], store.chunks, first)
    store.books.table[:, :count] = torch.randperm(used, device=store.pages.device).view(batch, count)
    store.books.lengths.fill_(stored)
    store.dense_keys.normal_()
    store.dense_values.normal_()
    if store.all_statistics is not None:
        store.all_statistics.total.uniform_(0, stored)
        store.all_statistics.count.fill_(stored)
        if store.all_statistics.samples is not None:
            store.all_statistics.samples.normal_()
