"""The layers of a model whose keys and values are stored: which, how large, and a configuration of what was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.adapters.transformers import NAME, MixKVQCache
from mixkvq.adapters.transformers.support import model_shape
from mixkvq.config import MixKVQConfig
from mixkvq.models import attention
from mixkvq.policies import Policy, policy_class
from mixkvq.store import MemoryReport


def quantized_layers(model: PreTrainedModel) -> list[int]:
    """Numbers of the layers whose keys and values a cache of this package would store."""
    cache = MixKVQCache(model.config, "bf16")
    return [index for index, layer in enumerate(cache.layers) if layer in cache.quantized_layers]


@torch.inference_mode()
def packed_memory(model: PreTrainedModel, config: MixKVQConfig, tokens: Tensor) -> MemoryReport:
    """What the cache of a configuration holds once a first block is packed.

    Args:
        tokens: ``[T]``, at least the sinks and a block.
    """
    cache = MixKVQCache(model.config, config)
    start = tokens[None, : config.sinks + config.residual_length].to(model.device)
    with attention(model, NAME):
        model(start, past_key_values=cache, use_cache=True)
    return cache.memory()


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
