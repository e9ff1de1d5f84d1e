"""Which models the packed cache can serve."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mixkvq.adapters.transformers.errors import UnsupportedModelError
from mixkvq.adapters.transformers.rope import rope_of
from mixkvq.config import ConfigError, MixKVQConfig
from mixkvq.layers import LayerSettings
from mixkvq.policies import Policy, policy_class


class ExpectedShape:
    """What a model's configuration says of its keys, to recognise a cache that was built for another model."""

    def __init__(self, config: PreTrainedConfig) -> None:
        heads = getattr(config, "num_attention_heads", None)
        # Some models without grouped queries carry a number of key/value heads that they do not use.
        self.heads = {n for n in (getattr(config, "num_key_value_heads", None), heads) if isinstance(n, int)}
        if getattr(config, "multi_query", False):
            self.heads.add(1)
        self.head_dim = getattr(config, "head_dim", None)
        if self.head_dim is None and isinstance(heads, int) and hasattr(config, "hidden_size"):
            self.head_dim = config.hidden_size // heads
        self.model_type = config.model_type

    def check(self, keys: Tensor) -> None:
        """Raise a ``ValueError`` unless keys ``[B, Hkv, L, D]`` are that model's, or a tensor-parallel share."""
        _, heads, _, dim = keys.shape
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        right_heads = not self.heads or heads in self.heads or (parallel and any(n % heads == 0 for n in self.heads))
        right_dim = not isinstance(self.head_dim, int) or self.head_dim == dim
        if not (right_heads and right_dim):
            raise ValueError(
                f"This cache was built for a {self.model_type} model with {min(self.heads)} key/value heads of "
                f"dimension {self.head_dim}, and was given keys of {heads} heads of dimension {dim}. "
                "Build it from this model's config: MixKVQCache(model.config, ...)."
            )


def refuse_unsupported(config: PreTrainedConfig, text: PreTrainedConfig) -> None:
    """Raise an ``UnsupportedModelError`` for architectures whose keys and values are not the cache's to store."""
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{text.model_type} uses multi-head latent attention (MLA): its cache is a low-rank latent already, and "
            "keys are made from it inside the layer. MixKVQCache does not support it."
        )
    if getattr(text, "num_kv_shared_layers", None) or getattr(text, "kv_sharing_modes", None):
        raise UnsupportedModelError(
            f"{text.model_type} shares keys and values between layers, which MixKVQCache does not support."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder; MixKVQCache supports decoder-only models."
        )


def check_finite(config: MixKVQConfig, keys: Tensor, values: Tensor) -> None:
    """With ``config.debug``, raise a ``FloatingPointError`` for keys or values that are not finite."""
    if not config.debug or (keys.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    for name, tensor in (("keys", keys), ("values", values)):
        if not bool(tensor.isfinite().all()):
            raise FloatingPointError(f"The model produced NaN or infinity in its {name}.")


def model_shape(config: PreTrainedConfig) -> str:
    """What a calibration is for: everything of a model that its settings by layer depend on, but its weights."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return (
        f"{text.model_type} of {text.num_hidden_layers} layers, hidden size {text.hidden_size}, "
        f"{text.num_attention_heads} query heads, {heads} key/value heads, vocabulary {text.vocab_size}"
    )


class Settings:
    """What a cache is made from: its configuration, and the decoder's part of the model's.

    Args:
        policy: None is the one that the configuration names.
    """

    def __init__(self, config: MixKVQConfig, policy: Policy | None, text: PreTrainedConfig) -> None:
        self.config, self.text = config, text
        self._given = policy
        self._policies: dict[MixKVQConfig, Policy] = {}

    def layer(self, index: int) -> LayerSettings:
        """A layer's own settings; layers with equal configurations share the policy."""
        own = self.config.for_layer(index)
        own = policy_class(own.policy).for_layer(own, index, self.text.num_hidden_layers)
        if own not in self._policies:
            self._policies[own] = self._given or policy_class(own.policy)(own)
        rope = rope_of(self.text, index) if own.key_rope == "before" else None
        return own, self._policies[own], rope


def settings(model_config: PreTrainedConfig, config: MixKVQConfig | str, policy: Policy | None, owner: str) -> Settings:
    """Check what a cache is made from.

    Args:
        config: a configuration, or text for :meth:`MixKVQConfig.parse`.
        policy: None is the one that the configuration names.
        owner: name of the cache's class, for errors.

    Raises:
        UnsupportedModelError: see :func:`refuse_unsupported`.
        ConfigError: the configuration is for another model.
    """
    if isinstance(config, str):
        config = MixKVQConfig.parse(config)
    if not isinstance(config, MixKVQConfig):
        raise TypeError(
            f"{owner} takes a MixKVQConfig second, or text like 'default:budget=3', not {type(config).__name__}."
        )
    if not isinstance(model_config, PreTrainedConfig):
        raise TypeError(
            f"{owner} takes the model's configuration (model.config) first, not {type(model_config).__name__}."
        )
    text = model_config.get_text_config(decoder=True)
    refuse_unsupported(model_config, text)
    _refuse_other_model(config, text)
    if policy is not None and config.layers:
        raise ConfigError(f"{owner} takes a policy of your own, or settings by layer, not both.")
    return Settings(config, policy, text)


def _refuse_other_model(config: MixKVQConfig, text: PreTrainedConfig) -> None:
    if config.model is not None and config.model != model_shape(text):
        raise ConfigError(
            f"This configuration was calibrated for another model: {config.model}. This one is a {model_shape(text)}. "
            "Calibrate for it (mixkvq calibrate), or use a preset."
        )
    if config.layers and len(config.layers) != text.num_hidden_layers:
        raise ConfigError(
            f"The configuration has settings for {len(config.layers)} layers, and this model has "
            f"{text.num_hidden_layers}."
        )
