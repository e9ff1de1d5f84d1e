"""The caches of all layers of a model in tensors of a fixed size: the twin of :mod:`.growing`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mixkvq.config import MixKVQConfig
from mixkvq.kernels.decode import decode_attention, torch_attention
from mixkvq.layers.flush import flush_step, pack, rehearse
from mixkvq.layers.recipe import LayerShape, Recipe
from mixkvq.layers.step import Step
from mixkvq.layers.surroundings import ordinary_tensors
from mixkvq.layers.turns import Turns
from mixkvq.policies import Policy
from mixkvq.quant.rope import Rope
from mixkvq.store import MemoryReport
from mixkvq.store.appending import AppendPlan
from mixkvq.store.books import CacheFullError, steps_left
from mixkvq.store.shape import Capacity, StaticShape
from mixkvq.store.static import StaticStore, new_store
from mixkvq.store.view import DenseTokens, PackedPages


class ModelCache:
    """Keys and values of several layers of the same shape, and attention over them.

    Every forward pass goes through the layers in order. One of a few tokens calls :meth:`decode` for each, which waits
    for no device and looks at no number that is not on it: it can be captured into a CUDA graph. A prompt calls
    :meth:`begin` once, and :meth:`attend` and :meth:`append` for each layer.

    Args:
        config: how they are stored.
        policy: who decides the bits.
        layers: how many there are.
        capacity: how much room to allocate, when the first tokens come.
        rope: the layers', with ``key_rope="before"``.

    Attributes:
        ready: whether a prompt is stored, so that :meth:`decode` may come.
        steps: tokens that every sequence can still get, as far as the host has seen.
    """

    def __init__(
        self, config: MixKVQConfig, policy: Policy, layers: int, capacity: Capacity, rope: Rope | None = None
    ) -> None:
        self.config, self.policy, self.layers, self.capacity = config, policy, layers, capacity
        self.rope = rope
        self.ready = False
        self.steps = 0
        self._turns = Turns(layers)
        self._rehearsed = False
        self._store: StaticStore | None = None
        self._recipe: Recipe | None = None
        self._plan: AppendPlan | None = None
        self._past: tuple[PackedPages | None, list[int]] = None, []

    @property
    def store(self) -> StaticStore:
        """The tensors; only once :meth:`allocate` was called."""
        assert self._store is not None
        return self._store

    @property
    def groups(self) -> list[ModelCache]:
        """This one: all layers have the same settings."""
        return [self]

    def store_of(self, layer: int) -> StaticStore:
        """The tensors that hold a layer."""
        return self.store

    @property
    def recipe(self) -> Recipe:
        """How blocks become pages; only once :meth:`allocate` was called."""
        assert self._recipe is not None
        return self._recipe

    @ordinary_tensors
    def allocate(self, keys: Tensor, values: Tensor) -> bool:
        """Start with no tokens, for layers and a batch like ``keys, values [B, Hkv, L, D]``.

        Returns:
            Whether tensors were allocated; those of an earlier start are used again if they fit.
        """
        self._turns.check(0)
        recipe = Recipe.of(self.config, self.policy, LayerShape.of(keys, values, self.rope))
        recipe.check_kernels(keys.device)
        recipe.warn_of_torch(keys.device)
        shape = StaticShape(
            layout=recipe.layout,
            layers=self.layers,
            batch=keys.shape[0],
            sinks=self.config.sinks,
            rotated=recipe.rotated,
            chunks_per_page=recipe.chunks_per_page,
            statistics=recipe.needs_statistics,
            sample_dtype=recipe.sample_dtype,
        )
        self.reset()
        old, self._recipe = self._store, recipe
        if old is not None and old.shape == shape and old.pages.device == keys.device:
            return False
        del old
        self._store = None  # first: there may not be room for both
        self._store, self._rehearsed = new_store(shape, self.capacity, keys.device), False
        return True

    # A few tokens

    @ordinary_tensors
    def decode(
        self,
        layer: int,
        step: Step,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of 1 to 8 new tokens, all of them real, over everything stored and causally over themselves.

        Stores them, too, and after the last layer quantizes the blocks that they complete.

        Returns:
            ``[B, Hq, L, D]`` in the queries' type.
        """
        self._turns.check(layer)
        store, length = self.store, step.length
        if step.query.shape[0] != store.shape.batch:
            raise ValueError(
                f"The cache holds a batch of {store.shape.batch} and was given one of {step.query.shape[0]}. Use a "
                "new cache, or reset() this one."
            )
        if layer == 0 and self.steps < length:
            raise self._full(f"there is room for {self.steps} more tokens of each sequence, and {length} came")
        with self._turns.take(layer):
            output = decode_attention(
                step.query,
                step.keys,
                step.values,
                store.tensors(layer),
                scaling=scaling,
                softcap=softcap,
                sinks=sinks,
                append=True,
                statistics=store.statistics(layer),
            )
            if layer == self.layers - 1:
                self.steps -= length
                flush_step(store, self.recipe, length)
        return output

    # A prompt

    @ordinary_tensors
    def begin(self, step: Step) -> None:
        """Plan where the tokens of a prompt go, before its first layer. Waits for the device.

        Raises:
            CacheFullError: they do not fit; nothing has changed then.
        """
        self._turns.check(0)
        store, books = self.store, self.store.books
        self.check()
        lengths = books.lengths.tolist()
        plan = AppendPlan.of(
            lengths,
            None if step.real is None else step.real.cpu(),
            step.length,
            sinks=store.shape.sinks,
            tokens=store.layout.tokens,
            slots=store.slots,
            next_page=int(books.next_page),
            device=store.pages.device,
        )
        if plan.pages and plan.pages[-1] >= books.pages:
            raise self._full(
                f"with the {sum(plan.lengths) - sum(lengths):,} new tokens, "
                f"{(plan.pages[-1] + 1) * store.layout.tokens:,} tokens are to be in pages"
            )
        view = PackedPages.of_cache(store.tensors(0))
        _, filled = store.tensors(0).places()
        self._plan, self._past = plan, (view, filled.tolist())

    @ordinary_tensors
    def attend(
        self,
        layer: int,
        step: Step,
        visible: Tensor | None,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`mixkvq.layers.LayerCache.attend`, between :meth:`begin` and :meth:`append`."""
        store = self.store
        pages, filled = self._past
        if pages is not None:
            pages = replace(pages, pages=store.pages[layer], chunks=store.chunks)
        dense = DenseTokens.of(store.dense_keys[layer], store.dense_values[layer], filled)
        return torch_attention(
            step.query,
            step.keys,
            step.values,
            pages,
            dense,
            visible,
            rotated=store.shape.rotated,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
        )

    @ordinary_tensors
    def append(self, layer: int, step: Step) -> None:
        """Store one layer's tokens as :meth:`begin` planned."""
        assert self._plan is not None
        store, plan, statistics = self.store, self._plan, self.store.statistics(layer)
        with self._turns.take(layer):
            if statistics is not None:
                statistics.update(step.query, step.real)
                statistics.sample(step.query, store.books.lengths, step.real)
                statistics = statistics.with_prompt(step.query, step.real)
            dense = store.dense_keys[layer], store.dense_values[layer]
            if plan.pages:
                numbers = plan.numbers + layer * store.books.pages
                pack(store, self.recipe, plan.source(*dense, step.keys, step.values), statistics, numbers)
            plan.keep(*dense, step.keys, step.values)
            if layer == self.layers - 1:
                self._finish(plan, step)

    def _finish(self, plan: AppendPlan, step: Step) -> None:
        """All layers have stored a prompt."""
        store, books = self.store, self.store.books
        books.enter(plan.lengths, plan.sequences, plan.columns, plan.numbers)
        self._plan, self._past = None, (None, [])
        store.settle()
        if not self._rehearsed:
            rehearse(store, self.recipe, step)
            self._rehearsed = True
        free = books.pages - int(books.next_page)
        self.steps = steps_left(plan.lengths, free, store.shape.sinks, store.layout.tokens)
        self.ready = True

    # All of it

    @ordinary_tensors
    def reset(self) -> None:
        """Forget all tokens; the tensors stay, for the next :meth:`allocate`."""
        self.ready, self.steps = False, 0
        self._turns.reset()
        self._plan, self._past = None, (None, [])
        if self._store is not None:
            self._store.reset()

    def check(self) -> None:
        """Raise a :class:`CacheFullError` if tokens were dropped, and warn if promoted channels had no room.

        Waits for the device.
        """
        if int(self.store.books.overflow):
            raise self._full("tokens that came after it was full were dropped")
        self.store.warn()

    def _full(self, what: str) -> CacheFullError:
        size, pages = self.store.layout.tokens, self.store.books.pages
        return CacheFullError(
            f"The cache is full: {what}. It has {pages} pages of {size} tokens, {pages * size:,} tokens for all "
            "sequences together. Give it a larger max_tokens or max_bytes, or reset() it."
        )

    @ordinary_tensors
    def memory(self) -> MemoryReport:
        """Bytes held, by part. Waits for the device."""
        if self._store is None:
            return MemoryReport()
        if int(self._store.books.overflow):
            self.check()
        return self._store.memory()
