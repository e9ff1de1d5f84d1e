"""The cache that a user hands to ``generate``."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from mixkvq.adapters.transformers.errors import UnsupportedModelError
from mixkvq.adapters.transformers.layer import MixKVQLayer
from mixkvq.adapters.transformers.masks import MaskReader
from mixkvq.adapters.transformers.support import ExpectedShape, settings
from mixkvq.config import MixKVQConfig
from mixkvq.layers import EvictingCache
from mixkvq.policies import Policy
from mixkvq.policies.conf_kv import confidence
from mixkvq.store import MemoryReport


def held_tensors(layer: object) -> list[Tensor]:
    """The tensors that a layer of the library's own holds."""
    return [value for value in vars(layer).values() if isinstance(value, Tensor)]


class MixKVQCache(Cache):
    """A KV cache in 2 to 4 bits for any model of transformers that goes through its attention interface.

    Layers with full attention are quantized; sliding windows, linear attention and the like keep the library's own
    layers. The model must have been loaded with ``attn_implementation="mixkvq"``::

        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="mixkvq")
        cache = MixKVQCache(model.config, MixKVQConfig.preset("default"))
        model.generate(**inputs, past_key_values=cache)

    Args:
        model_config: ``model.config``.
        config: how keys and values are stored: a :class:`MixKVQConfig`, or text for :meth:`MixKVQConfig.parse`.
        policy: one of your own that decides the bits, instead of the one that ``config.policy`` names.

    Raises:
        UnsupportedModelError: multi-head latent attention, layers that share keys and values, encoder-decoders.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: MixKVQConfig | str = "default",
        policy: Policy | None = None,
    ) -> None:
        checked = settings(model_config, config, policy, type(self).__name__)
        self.config = checked.config
        masks, expected = MaskReader(), ExpectedShape(checked.text)
        layers = [
            MixKVQLayer(checked.layer(index), masks, expected) if type(layer) is DynamicLayer else layer
            for index, layer in enumerate(DynamicCache(config=model_config).layers)
        ]
        #: The layers that this package stores.
        self.quantized_layers = [layer for layer in layers if isinstance(layer, MixKVQLayer)]
        if not self.quantized_layers:
            raise UnsupportedModelError(
                f"None of the {len(layers)} layers of this {checked.text.model_type} model has full attention: there "
                "is nothing to quantize."
            )
        # All but linear attention, which has no length.
        self._lengthy = [layer for layer in layers if isinstance(layer, CacheLayerMixin)]
        super().__init__(layers=layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`MixKVQLayer.update`; layers that are not quantized return tensors."""
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"The model has a layer {layer_idx}, but this cache was built for one of {len(self.layers)} layers. "
                "Build it from this model's config: MixKVQCache(model.config, ...)."
            )
        if self.layers[layer_idx] is self._lengthy[0] and self._is_torn():
            raise ValueError(
                f"Not all of this cache's {len(self.layers)} layers got tokens in the last forward pass: it was built "
                "for another model, or the pass was interrupted. Use a new MixKVQCache(model.config, ...), or reset() "
                "this one."
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(keys, Tensor):
            keys._mixkvq = True  # type: ignore[attr-defined]  # not a stock cache: see `attention.py`
        return keys, values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens, in all layers or, where one cannot, in none; see :meth:`MixKVQLayer.crop`."""
        for layer in self.quantized_layers:
            if isinstance(layer.cache, EvictingCache):
                layer.cache.check_crop(range(layer.cache.store.batch))
        super().crop(*args, **kwargs)

    def _is_torn(self) -> bool:
        """Whether some layers have taken tokens of the last forward pass and others have not."""
        lengths = {layer.get_seq_length() for layer in self._lengthy}
        return len(lengths) > 1 or any(layer.torn for layer in self.quantized_layers)

    @property
    def uses_confidence(self) -> bool:
        """Whether :meth:`observe` changes anything: whether the policy asks for the model's confidence."""
        return any(layer.policy.uses_confidence for layer in self.quantized_layers)

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:
        """Tell a cache that follows the model's confidence what the model said after the last forward pass's tokens.

        In ``generate`` :func:`mixkvq.confidence_processors` does it. Without it, no step counts as confident.

        Args:
            logits: ``[B, n, V]`` of the pass's last n tokens. A pass of which not every token has logits is a prompt,
                and no step of one token.
        """
        if not self.uses_confidence:
            return
        given = confidence(logits).tolist()
        if (real := self.quantized_layers[0].real) is not None:
            newest = real[:, -logits.shape[1] :].tolist()
            given = [list(compress(row, kept)) for row, kept in zip(given, newest, strict=True)]
        for layer in self.quantized_layers:
            layer.observe(given)

    def memory(self) -> MemoryReport:
        """Bytes held, by part, over all layers, and bits per element."""
        report = MemoryReport()
        for layer in self.layers:
            if isinstance(layer, MixKVQLayer):
                report += layer.memory()
            else:
                report.parts["other layers"] += sum(tensor.nbytes for tensor in held_tensors(layer))
        return report

    def __repr__(self) -> str:
        return f"MixKVQCache({len(self.quantized_layers)} of {len(self.layers)} layers, {self.config})"
