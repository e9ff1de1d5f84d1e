"""From what was found for single layers to a configuration for their model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from mixkvq.adapters.transformers import MixKVQCache
from mixkvq.adapters.transformers.support import model_shape
from mixkvq.config import MixKVQConfig
from mixkvq.policies import Policy, policy_class


def quantized_layers(model: PreTrainedModel) -> list[int]:
    """Numbers of the layers whose keys and values a cache of this package would store."""
    cache = MixKVQCache(model.config, "bf16")
    return [index for index, layer in enumerate(cache.layers) if layer in cache.quantized_layers]


def with_layers(base: MixKVQConfig, fields: Mapping[int, Mapping[str, Any]], model: PreTrainedModel) -> MixKVQConfig:
    """``base`` with fields of its own for some layers, for this model alone."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    return base.replace(layers=[fields.get(i, {}) for i in range(count)], model=model_shape(model.config))


def with_policy(base: MixKVQConfig, policy: type[Policy]) -> dict[str, Any]:
    """Fields that give a layer of ``base`` another policy: its own, and none of those of the policy of ``base``."""
    foreign = policy_class(base.policy).fields - policy.fields
    return {
        "policy": policy.name,
        **{field: getattr(MixKVQConfig, field) for field in base.changed if field in foreign},
    }
