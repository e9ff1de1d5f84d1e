"""The cache of one layer whose codes lose half their bits whenever they would exceed a budget."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mixkvq.config import MixKVQConfig
from mixkvq.layers.growing import LayerCache
from mixkvq.layers.recipe import MAX_QUANTIZED, LayerShape, Recipe
from mixkvq.layers.step import Step
from mixkvq.layers.surroundings import ordinary_tensors
from mixkvq.policies import Policy
from mixkvq.policies.pm_kvq import FIRST_CODES, WIDTHS
from mixkvq.quant.block import DENSE_BITS, QuantizedKeys, QuantizedValues
from mixkvq.quant.narrow import narrow_codes, narrow_scale
from mixkvq.quant.salience import QueryStatistics
from mixkvq.store.appending import FullBlocks
from mixkvq.store.books import CacheFullError
from mixkvq.store.narrowing import narrow_pages
from mixkvq.store.packing import write_blocks


class NarrowingCache(LayerCache):
    """Pages start at 16 bits, and all of them narrow together, as far as the configuration's own width.

    Tokens become codes once, at 8 bits; from then on only integers change. As tokens come, pages, spare ones included,
    never hold more than those of ``plan_tokens`` tokens of every sequence at the last width. While they are rewritten,
    old and new ones are held at once.
    """

    @ordinary_tensors
    def __init__(self, config: MixKVQConfig, policy: Policy, like: Step) -> None:
        shape = LayerShape.of(like.keys, like.values)
        stages = {}
        for width in WIDTHS[: WIDTHS.index(config.key_bits) + 1]:
            own = config.replace(key_bits=width, value_bits=width)
            stages[width] = Recipe.of(own, type(policy)(own), shape)
        first = stages[DENSE_BITS]
        super().__init__(first.config, first.policy, like)
        assert config.plan_tokens is not None
        self.stages = stages
        self.plan_tokens = config.plan_tokens
        #: Bytes of a sequence's pages at most.
        self.budget = config.plan_tokens // config.residual_length * stages[config.key_bits].layout.page.nbytes

    @property
    def width(self) -> int:
        """Bits of every code now."""
        return self.recipe.layout.key_bits

    @ordinary_tensors
    def append(self, step: Step) -> None:
        """Store new tokens; narrow all pages first if those of the blocks that they complete have no room.

        Raises:
            CacheFullError: the longest sequence is longer than the budget was planned for. Nothing has changed then.
        """
        new = [step.length] * self.store.batch if step.real is None else step.real.sum(1).tolist()
        longest = max(length + more for length, more in zip(self.store.lengths, new, strict=True))
        self._make_room(max(longest - self.store.sinks, 0) // self.config.residual_length)
        super().append(step)

    def _make_room(self, pages: int) -> None:
        """Narrow until a sequence may have so many pages."""
        widths = [width for width in self.stages if width <= self.width]
        fitting = [width for width in widths if pages * self._page_bytes(width) <= self.budget]
        if not fitting:
            raise CacheFullError(
                f"The cache was planned for {self.plan_tokens:,} tokens of each sequence at {widths[-1]} bits, and "
                "there would be more: give a new one a larger plan_tokens."
            )
        while self.width != fitting[0]:
            self._narrow()
        self.store.pages.limit = self.store.batch * (self.budget // self._page_bytes(self.width))

    def _page_bytes(self, width: int) -> int:
        return self.stages[width].layout.page.nbytes

    def _narrow(self) -> None:
        """All pages at half their width."""
        old, new = self.recipe, self.stages[self.width // 2]
        self.recipe, self.config, self.policy = new, new.config, new.policy
        if old.layout.key_bits == DENSE_BITS:
            self._code_pages(old, new)
        else:
            self.store.replace_pages(new.layout, narrow_pages(old.layout, new.layout, self.store.pages.data))

    def _code_pages(self, old: Recipe, new: Recipe) -> None:
        """From the model's own numbers to the first codes."""
        fields, numbers = self.store.pages.fields(), self.store.pages.live()
        pages = self.store.pages.data.new_empty(self.store.pages.capacity, new.layout.page.nbytes)
        size = max(1, MAX_QUANTIZED // (old.layout.kv_heads * old.layout.tokens * old.layout.key_dim))
        for start in range(0, len(numbers), size):
            at = torch.tensor(numbers[start : start + size], device=pages.device)
            blocks = self._coded(fields["keys"][at], fields["values"][at])
            write_blocks(new.layout, pages, {}, *blocks, at, {})
        self.store.replace_pages(new.layout, pages)

    def _flush(self, blocks: FullBlocks, seen: QueryStatistics | None) -> None:
        self.store.write(blocks.sequences, *self._coded(blocks.keys, blocks.values))

    def _coded(self, keys: Tensor, values: Tensor) -> tuple[QuantizedKeys, QuantizedValues]:
        """Blocks ``keys, values [N, Hkv, R, D]`` at the present width: by way of the first codes, as older ones."""
        width = max(self.width, FIRST_CODES)
        recipe = self.stages[width]
        coded = recipe.quantize(keys, values, recipe.plan(keys, None), None)
        while width > self.width:
            coded = _halved(*coded, width, recipe.layout.param_dtype)
            width //= 2
        return coded


def _halved(
    keys: QuantizedKeys, values: QuantizedValues, bits: int, dtype: torch.dtype
) -> tuple[QuantizedKeys, QuantizedValues]:
    """Codes of ``bits`` bits as codes of half as many."""
    return (
        replace(
            keys,
            codes=narrow_codes(keys.codes, bits),
            scale=narrow_scale(keys.scale, bits, dtype),
            bits=keys.bits // 2,
        ),
        replace(values, codes=narrow_codes(values.codes, bits), scale=narrow_scale(values.scale, bits, dtype)),
    )
