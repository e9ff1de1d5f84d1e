"""A layer of the statically shaped cache as transformers sees it, and what all of these layers share."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mixkvq.adapters.transformers.errors import UnsupportedModelError
from mixkvq.adapters.transformers.handle import KVHandle
from mixkvq.adapters.transformers.masks import MaskReader, mark_positions
from mixkvq.adapters.transformers.static_op import attend, new_anchor
from mixkvq.adapters.transformers.support import ExpectedShape, check_finite
from mixkvq.kernels.decode import MAX_STEP
from mixkvq.kernels.partial import causal
from mixkvq.layers import GroupedCache, ModelCache, Step


class StaticState:
    """What the layers of a :class:`MixKVQStaticCache` share.

    Attributes:
        cache: the packed cache of all layers.
        positions: 0-dim int64 on the device, positions seen, padding included.
        anchor: see :mod:`.static_op`.
        limit: positions that there is room for, as the host knew after the last prompt.
        open: whether layers of the library's own have taken tokens of a forward pass that is not over.
        ours_is_last: whether none of those comes after the last quantized layer.
    """

    def __init__(self, cache: ModelCache | GroupedCache, expected: ExpectedShape) -> None:
        self.cache = cache
        self.expected = expected
        self.masks = MaskReader()
        self.limit = -1
        self.open, self.ours_is_last = False, True
        self.positions: Tensor | None = None
        self.anchor: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticState:
        """A copy with an anchor of its own, by which its cache is found."""
        other = object.__new__(type(self))
        memo[id(self)] = other
        with torch.inference_mode(False):
            vars(other).update({name: copy.deepcopy(x, memo) for name, x in vars(self).items() if name != "anchor"})
        other.anchor = None if self.anchor is None else new_anchor(other.cache, self.anchor.device)
        if other.positions is not None:
            mark_positions(other.positions)
        return other

    @property
    def ready(self) -> bool:
        """Whether a prompt is stored, so that single tokens take the way that can be compiled."""
        return self.cache.ready

    def reset(self) -> None:
        """Forget all tokens. Tensors stay where they are, for a batch of the same size."""
        self.cache.reset()
        self.limit, self.open = -1, False

    @torch.compiler.disable
    def seen(self) -> int:
        """Positions seen. Waits for the device."""
        return int(self.positions) if self.ready and self.positions is not None else 0

    @torch.compiler.disable
    def arrive(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Check a prompt's keys and values ``[B, Hkv, L, D]``, and allocate when the first ones come."""
        self.expected.check(keys)
        check_finite(self.cache.config, keys, values)
        if layer == 0 and not self.ready:
            self._start(keys, values)
        store = self.cache.store_of(layer)
        layout = store.layout
        shapes = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
        if shapes != (layout.kv_heads, layout.key_dim, layout.value_dim, layout.dense_dtype, store.pages.device):
            raise UnsupportedModelError(
                "The layers of this model differ in their key/value heads, head dimensions, types or devices, and "
                "MixKVQStaticCache keeps all of them in the same tensors. Use MixKVQCache."
            )
        if keys.shape[0] != store.shape.batch:
            raise ValueError(
                f"The cache holds a batch of {store.shape.batch} and was given one of {keys.shape[0]}. Use a new "
                "MixKVQStaticCache, or reset() this one."
            )

    def _start(self, keys: Tensor, values: Tensor) -> None:
        fresh = self.cache.allocate(keys, values)
        if fresh or self.anchor is None:
            # New ones along with new tensors: a graph that holds the old addresses is not to be replayed.
            self.anchor = new_anchor(self.cache, keys.device)
            with torch.inference_mode(False):
                self.positions = torch.zeros((), dtype=torch.long, device=keys.device)
            mark_positions(self.positions)
        assert self.positions is not None
        self.positions.zero_()

    @torch.compiler.disable
    def attend(
        self,
        layer: int,
        module: nn.Module,
        step: Step,
        mask: Tensor | None,
        scaling: float,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention of any number of new tokens, which are stored. Returns ``[B, L, Hq, D]``."""
        visible, real = self.masks.read(mask, step.query.shape[0], step.length)
        step = Step(step.query, step.keys, step.values, real)
        if self.ready and step.length <= MAX_STEP and real is None:
            if visible is not None and not bool((visible == causal(step.length, step.length, visible.device)).all()):
                raise UnsupportedModelError(
                    f"A step of 2 to {MAX_STEP} tokens on a MixKVQStaticCache is causal; the mask of this one is "
                    "not (a tree of drafts?). Use MixKVQCache."
                )
            return self.cache.decode(layer, step, scaling=scaling, **options).transpose(1, 2)
        if layer == 0:
            self.cache.begin(step)
        if not self.ready and not any(option is not None for option in options.values()):
            output = sdpa_attention_forward(module, step.query, step.keys, step.values, mask, scaling=scaling)[0]
        else:
            output = self.cache.attend(layer, step, visible, scaling=scaling, **options).transpose(1, 2)
        self.cache.append(layer, step)
        if layer == self.cache.layers - 1:
            self.limit = self.seen() + step.length + self.cache.steps
        return output

    def stored(self, layer: int, length: int) -> None:
        """Count the positions of a pass that ``layer`` has taken: with the last one, so that a pass that fails counts
        for nothing.
        """
        if layer == self.cache.layers - 1:
            assert self.positions is not None
            self.positions.add_(length)
            self.open = self.open and not self.ours_is_last


class MixKVQStaticLayer(CacheLayerMixin):
    """One full-attention layer of a :class:`MixKVQStaticCache`; ``index`` counts these layers alone."""

    is_compileable = True
    is_sliding = False
    supports_early_init = False
    keys = values = None

    def __init__(self, state: StaticState, index: int) -> None:
        self.state = state
        self.index = index

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether a prompt is stored."""
        return self.state.ready

    # What transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: :meth:`update` allocates for all layers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take new keys and values ``[B, Hkv, L, D]``; returns a handle for each, for the attention function."""
        length = key_states.shape[2]
        if length > 1 or not self.state.ready:
            self.state.arrive(self.index, key_states, value_states)
        return KVHandle(self, key_states, length), KVHandle(self, value_states, length)

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Positions seen, padding included: a tensor on the device once there are any, as in the library's own."""
        positions = self.state.positions
        return positions if self.state.ready and positions is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """For a prompt the positions that it sees; for a single token those that there is room for."""
        if query_length == 1 and self.state.ready:
            return self.state.limit, 0
        return self.state.seen() + query_length, 0

    def get_max_length(self) -> int:
        """Positions that there is room for; -1 before a prompt came, which decides it."""
        return self.state.limit

    def reset(self) -> None:
        """Forget all tokens, with the first layer those of all; tensors stay where they are."""
        if self.index == 0:
            self.state.reset()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "MixKVQStaticCache keeps every sequence of the batch where it is: no beams, no assisted decoding, no "
            "crop, no selected or repeated rows. Use MixKVQCache for those."
        )

    reorder_cache = crop = batch_select_indices = batch_repeat_interleave = _refuse
    offload = prefetch = _refuse

    # What the attention function calls

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``query [B, Hq, L, D]`` over all tokens; stores the new ones. Returns ``[B, L, Hq, D]``.

        A single token is stored for every sequence, whatever the mask says.
        """
        if query.shape[2] == 1 and self.state.ready:
            assert self.state.anchor is not None
            output = attend(query, key, value, self.state.anchor, self.index, scaling, softcap, sinks)
        else:
            options = {"softcap": softcap, "sinks": sinks}
            output = self.state.attend(self.index, module, Step(query, key, value), mask, scaling, options)
        self.state.stored(self.index, query.shape[2])
        return output
