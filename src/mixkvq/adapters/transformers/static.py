"""The cache of a fixed size, for compiled decoding."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from mixkvq.adapters.transformers.cache import held_tensors
from mixkvq.adapters.transformers.errors import UnsupportedModelError
from mixkvq.adapters.transformers.static_layer import MixKVQStaticLayer, StaticState
from mixkvq.adapters.transformers.support import ExpectedShape, settings
from mixkvq.config import ConfigError, MixKVQConfig
from mixkvq.layers import new_model_cache
from mixkvq.policies import Policy
from mixkvq.store import MemoryReport
from mixkvq.store.shape import Capacity


class MixKVQStaticCache(Cache):
    """A :class:`MixKVQCache` that is allocated once, so that ``generate`` compiles decoding into CUDA graphs::

        cache = MixKVQStaticCache(model.config, "default", max_tokens=65536)
        model.generate(**inputs, past_key_values=cache)

    Give either ``max_tokens`` or ``max_bytes``. Sequences of the batch share the room as they need it. Everything is
    allocated when the first prompt comes, and kept by :meth:`reset` for the next batch of the same size.

    Args:
        model_config: ``model.config``.
        config: how keys and values are stored: a :class:`MixKVQConfig`, or text for :meth:`MixKVQConfig.parse`.
        max_tokens: packed tokens to make room for, of all sequences together. Each sequence also has its sinks and a
            residual of R tokens.
        max_bytes: bytes of everything that the quantized layers hold.
        promoted_share: with thresholds, the share of key channels to make room for in every promoted width. None
            measures it on the first prompt, and adds a quarter; with ``max_bytes``, where that is too late, it is .25.
        policy: one of your own that decides the bits; it needs a :attr:`mixkvq.policies.Policy.rule`.

    Raises:
        UnsupportedModelError: what :class:`MixKVQCache` does not support either, and layers of different shapes.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: MixKVQConfig | str = "default",
        *,
        max_tokens: int | None = None,
        max_bytes: int | None = None,
        promoted_share: float | None = None,
        policy: Policy | None = None,
    ) -> None:
        checked = settings(model_config, config, policy, type(self).__name__)
        self.config = checked.config
        # The library allocates full-attention layers by this length, which are all replaced, and windows by theirs.
        layers = StaticCache(config=model_config, max_cache_len=sys.maxsize).layers
        full = [at for at, layer in enumerate(layers) if type(layer) is StaticLayer]
        self._refuse_layers(layers, len(full), checked.text)
        own = [checked.layer(at) for at in full]
        for _, each, _ in own:
            if each.evicts:
                raise ConfigError(
                    f"MixKVQStaticCache keeps all tokens, and the {each.name} policy evicts some. Use MixKVQCache."
                )
            if each.recent:
                raise ConfigError(
                    f"MixKVQStaticCache has a residual of a fixed size, and the {each.name} policy keeps a share of "
                    f"the context there (recent={each.recent:g}). Set recent to 0, or use MixKVQCache."
                )
            if each.rule is None:
                raise ConfigError(
                    f"MixKVQStaticCache decides bits on the device, by a policy's rule, and {type(each).__name__} has "
                    "none. Give it a rule, or use MixKVQCache."
                )
        cache = new_model_cache(own, Capacity(max_tokens, max_bytes, promoted_share))
        self.state = StaticState(cache, ExpectedShape(checked.text))
        for index, at in enumerate(full):
            layers[at] = MixKVQStaticLayer(self.state, index)
        #: The layers that this package stores.
        self.quantized_layers = [layers[at] for at in full]
        lengthy = [at for at, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)]
        self._first, self._last = lengthy[0], lengthy[-1]
        self.state.ours_is_last = full[-1] == self._last
        super().__init__(layers=layers)

    @staticmethod
    def _refuse_layers(layers: list[Any], full: int, config: PreTrainedConfig) -> None:
        if not full:
            raise UnsupportedModelError(
                f"None of the {len(layers)} layers of this {config.model_type} model has full attention: there is "
                "nothing to quantize."
            )
        others = {type(x).__name__ for x in layers if isinstance(x, StaticLayer) and not x.is_sliding}
        if others != {StaticLayer.__name__}:
            raise UnsupportedModelError(
                f"MixKVQStaticCache does not support layers like those of this {config.model_type} model "
                f"({', '.join(sorted(others - {StaticLayer.__name__}))}). Use MixKVQCache."
            )

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`MixKVQStaticLayer.update`; layers that are not quantized return tensors."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"The model has a layer {layer_idx}, but this cache was built for one of {len(self.layers)} layers. "
                "Build it from this model's config: MixKVQStaticCache(model.config, ...)."
            )
        if layer_idx == self._first and self.state.open:
            raise ValueError(
                "Not all of this cache's layers got tokens in the last forward pass: it was interrupted, or it failed "
                "after sliding windows had taken theirs. Use a new MixKVQStaticCache, or reset() this one."
            )
        if not isinstance(self.layers[layer_idx], MixKVQStaticLayer):
            self.state.open = layer_idx != self._last
        self._refit(self.layers[layer_idx], key_states.shape[0])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(keys, Tensor) and not torch.compiler.is_compiling():
            keys._mixkvq = True  # type: ignore[attr-defined]  # not a stock cache: see `attention.py`
        return keys, values

    def _refit(self, layer: Any, batch: int) -> None:
        """After a reset, let a layer of the library's own take a batch of another size."""
        held = isinstance(layer, StaticLayer) and layer.is_initialized
        if held and not self.state.ready and layer.keys.shape[0] != batch:
            layer.is_initialized = False

    def memory(self) -> MemoryReport:
        """Bytes held, by part, over all layers, and bits per element. Waits for the device.

        Raises:
            CacheFullError: tokens were dropped because the cache was full.
        """
        report = self.state.cache.memory()
        for tensor in (self.state.positions, self.state.anchor):
            report.parts["tables"] += 0 if tensor is None else tensor.nbytes
        for layer in self.layers:
            if not isinstance(layer, MixKVQStaticLayer):
                report.parts["other layers"] += sum(tensor.nbytes for tensor in held_tensors(layer))
        return report

    def __repr__(self) -> str:
        return f"MixKVQStaticCache({len(self.quantized_layers)} of {len(self.layers)} layers, {self.config})"
