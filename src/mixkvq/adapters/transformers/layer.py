"""One layer's cache as transformers sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mixkvq.adapters.transformers.errors import UnsupportedModelError
from mixkvq.adapters.transformers.handle import KVHandle
from mixkvq.adapters.transformers.masks import MaskReader, to_bool
from mixkvq.adapters.transformers.support import ExpectedShape, check_finite
from mixkvq.layers import EvictingCache, LayerCache, LayerSettings, Step, new_layer_cache
from mixkvq.store import MemoryReport


class MixKVQLayer(CacheLayerMixin):
    """One full-attention layer of a :class:`MixKVQCache`.

    Attributes:
        cache: the packed cache, once the first tokens have come.
        record_past: hold the newest tokens back until the next step, so that ``crop`` takes them back exactly; assisted
            decoding asks for it.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, settings: LayerSettings, masks: MaskReader, expected: ExpectedShape) -> None:
        super().__init__()
        self.config, self.policy, self.rope = settings
        self.masks = masks
        self.expected = expected
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.cache: LayerCache | EvictingCache | None = None
        self.is_initialized = False
        self.seen = 0  # positions, padding included
        self.real: Tensor | None = None  # [B, seen] bool; None while no padding was seen
        self.pending = False  # whether keys and values came for which attention was not computed yet
        self.held: Step | None = None
        self.torn = False  # whether storing tokens was interrupted

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: :meth:`attend` makes the cache when it has seen a query."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take new keys and values ``[B, Hkv, L, D]``; returns a handle for each, for the attention function."""
        self.expected.check(key_states)
        check_finite(self.config, key_states, value_states)
        self.pending = True
        length = self.seen + key_states.shape[2]
        return KVHandle(self, key_states, length), KVHandle(self, value_states, length)

    def get_seq_length(self) -> int:
        """Positions seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        if self.policy.evicts:
            raise NotImplementedError(
                "Assisted decoding and prompt lookup take tokens back, and the "
                f"{self.policy.name} policy has evicted others for them. Generate without, or use a cache that keeps "
                "all tokens, such as 'default'."
            )
        self.record_past = True

    def reset(self) -> None:
        """Forget all tokens and give their memory back."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows (numbers or a boolean mask); named twice, a row shares its pages."""
        if self.cache is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        batch, rows = self.cache.store.batch, indices.tolist()
        if not all(-batch <= row < batch for row in rows):
            raise IndexError(f"Rows {rows} of a batch of {batch}: they are {-batch} to {batch - 1}.")
        self._commit()
        self.cache.select([row % batch for row in rows])
        if self.real is not None:
            self.real = self.real[indices.to(self.real.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.batch_select_indices(torch.arange(self.cache.store.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` positions; see :meth:`mixkvq.layers.LayerCache.crop`."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative integer, as in "
                "transformers' own caches."
            )
        count = min(-tokens_to_remove, self.seen)
        if count == 0 or self.cache is None:
            return
        kept = self.seen - count
        if self.held is not None:
            left = self.held.length - count
            self.held = self.held.tokens(0, left) if left > 0 else None
            count = max(-left, 0)
        stored = kept + count  # positions that are in the store, before the cut
        if count:
            if self.real is None:
                removed = [count] * self.cache.store.batch
            else:
                removed = self.real[:, kept:stored].sum(1).tolist()
            self.cache.crop(removed)
        self.seen = kept
        if self.real is not None:
            self.real = self.real[:, :kept]

    # What the attention function calls

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        **options: Any,
    ) -> Tensor:
        """Attention of ``query [B, Hq, L, D]`` over all tokens; stores the new ones. Returns ``[B, L, Hq, D]``."""
        if not self.pending:
            raise UnsupportedModelError(
                "Keys and values of one layer reached the attention function twice (shared between layers?), which "
                "the packed cache does not support."
            )
        self.pending = False
        visible, real = self.masks.read(mask, query.shape[0], query.shape[2])
        step = Step(query, key, value, real)
        self._commit()
        if self.cache is None:
            self.cache = new_layer_cache(self.config, self.policy, step, self.rope)
            self.is_initialized = True
        elif self.cache.store.batch != query.shape[0]:
            raise ValueError(
                f"The cache holds a batch of {self.cache.store.batch} and was given one of {query.shape[0]}. Use a "
                "new MixKVQCache, or reset() this one."
            )
        if self.config.debug:
            self._check_past(mask, step)
        if self.seen == 0 and not any(option is not None for option in options.values()):
            output = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]
            if isinstance(self.cache, EvictingCache):
                self.cache.weigh(step, visible, scaling=scaling)
        else:
            output = self.cache.attend(step, visible, scaling=scaling, **options).transpose(1, 2)
        self._take(step)
        return output

    def observe(self, confidences: Sequence[Sequence[float]]) -> None:
        """How confident the model was after the last tokens; see :meth:`mixkvq.layers.EvictingCache.observe`."""
        if isinstance(self.cache, EvictingCache):
            self.cache.observe(confidences)

    def _take(self, step: Step) -> None:
        """Store a step's tokens, or hold them back."""
        self.torn = True
        if step.real is not None and self.real is None:
            self.real = step.real.new_ones(step.real.shape[0], self.seen)
        if self.real is not None:
            real = step.real
            if real is None:
                real = self.real.new_ones(self.real.shape[0], step.length)
            self.real = torch.cat([self.real, real], 1)
        self.seen += step.length
        assert self.cache is not None
        if self.record_past:
            # Enough for any draft, and no more than a page: a long prompt is not to wait unpacked.
            early = step.length - self.config.residual_length
            if early > 0:
                self.cache.append(step.tokens(0, early))
                step = step.tokens(early, step.length)
            self.held = step.copy()  # not a view, which would keep the whole prompt's queries, keys and values
        else:
            self.cache.append(step)
        self.torn = False

    def _commit(self) -> None:
        if self.held is not None:
            assert self.cache is not None
            self.torn = True
            self.cache.append(self.held)
            self.held = None
            self.torn = False

    def _check_past(self, mask: Tensor | None, step: Step) -> None:
        if mask is None or self.seen == 0:
            return
        past = to_bool(mask)[:, 0, :, : self.seen]
        wanted = past.new_ones(1, self.seen) if self.real is None else self.real
        rows = past.new_ones(1, step.length) if step.real is None else step.real
        if bool(((past != wanted[:, None]) & rows[:, :, None]).any()):
            raise UnsupportedModelError(
                "The attention mask hides tokens that are already in the cache from some of the new ones. Packed "
                "tokens are visible to every query of their sequence."
            )

    def memory(self) -> MemoryReport:
        """Bytes held by this layer."""
        if self.cache is None:
            return MemoryReport()
        report = self.cache.memory()
        if self.real is not None:
            report.parts["tables"] += self.real.nbytes
        if self.held is not None:
            held = (self.held.query, self.held.keys, self.held.values)
            report.parts["residual"] += sum(tensor.nbytes for tensor in held)
            tokens = step_tokens(self.held)
            report.elements += tokens * (held[1][0, :, 0].numel() + held[2][0, :, 0].numel())
        return report


def step_tokens(step: Step) -> int:
    """Real tokens of a step, over the batch."""
    return step.keys.shape[0] * step.length if step.real is None else int(step.real.sum())
