"""Tiny random models of the real classes."""

from __future__ import annotations

from functools import cache

import torch
import transformers as tf
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}

#: Configuration class, and what differs from SIZE; the model class follows from the configuration.
ARCHITECTURES: dict[str, tuple[type, dict]] = {
    "llama": (tf.LlamaConfig, {}),
    "smollm": (tf.LlamaConfig, {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}),
    "smollm3": (tf.SmolLM3Config, {"no_rope_layers": [1, 0]}),
    "qwen2": (tf.Qwen2Config, {}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 16}),
    "qwen3-moe": (tf.Qwen3MoeConfig, {**EXPERTS, "head_dim": 16}),
    "mistral": (tf.MistralConfig, {"sliding_window": None}),
    "phi3": (tf.Phi3Config, {"hidden_size": 96}),  # head dimension 24
    "gemma2": (tf.Gemma2Config, {**WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16}),  # soft-capped logits
    "gemma3": (tf.Gemma3TextConfig, {**WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "cohere2": (tf.Cohere2Config, WINDOW),
    "gpt-neox": (tf.GPTNeoXConfig, {}),
    "gpt-oss": (  # attention sinks
        tf.GptOssConfig,
        {**WINDOW, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


@cache
def tiny_model(architecture: str) -> PreTrainedModel:
    """A model of the real class with random weights, in float32, for evaluation."""
    kind, changes = ARCHITECTURES[architecture]
    return random_model(kind(**{**SIZE, **changes}))


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, in float32, for evaluation."""
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        # Weights large enough that logits differ and attention is not flat.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.15)
        elif "sinks" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()
