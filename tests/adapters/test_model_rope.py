"""RoPE of real classes: keys that are the same before it at every token lose nothing in two bits."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from mixkvq import MixKVQCache, MixKVQStaticCache, UnsupportedModelError
from mixkvq.adapters.transformers.rope import rope_of
from mixkvq.models import attention
from models import ARCHITECTURES, SIZE, VOCABULARY, random_model, tiny_model

#: Two bits for keys, and nothing lost of the rest.
KEYS = "kvquant-2:outliers=0,value_bits=16,residual_length=32,key_group=32,scale_dtype=float32"
IMAGES = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}


def with_constant_keys(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose keys before RoPE do not depend on the token."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(old := getattr(module, "k_proj", None), nn.Linear):
            module.k_proj = nn.Linear(old.in_features, old.out_features)
            nn.init.zeros_(module.k_proj.weight)
            nn.init.normal_(module.k_proj.bias)
        elif isinstance(fused := getattr(module, "query_key_value", None), nn.Linear):  # GPT-NeoX: q, k, v by head
            fused.weight.data.unflatten(0, (SIZE["num_attention_heads"], 3, -1))[:, 1] = 0
    return model


MODELS = {
    **{name: lambda name=name: tiny_model(name) for name in ARCHITECTURES if name != "phi3"},  # which fuses q, k and v
    "glm": lambda: random_model(tf.GlmConfig(**SIZE, head_dim=16)),  # neighbours are pairs, of half of the channels
    "yarn": lambda: random_model(tf.LlamaConfig(**SIZE, rope_parameters=YARN)),
}


@pytest.mark.parametrize("name", MODELS)
def test_constant_keys_lose_nothing(name: str):
    model = with_constant_keys(MODELS[name]())
    ids = torch.randint(3, VOCABULARY, (2, 150))
    mask = (torch.arange(150) >= torch.tensor([0, 41])[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    options = {"max_new_tokens": 70, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}

    def logits(cache, implementation: str = "mixkvq") -> torch.Tensor:
        with attention(model, implementation):
            out = model.generate(**inputs, past_key_values=cache, output_logits=True, **options)
        return torch.stack(out.logits, 1)

    expected = logits(DynamicCache(config=model.config), "eager")
    assert torch.allclose(logits(MixKVQCache(model.config, KEYS)), expected, atol=2e-3, rtol=1e-3)
    if name not in ("cohere2",):  # which has no RoPE where attention is full
        assert not torch.allclose(logits(MixKVQCache(model.config, KEYS + ",key_rope=after")), expected, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "smollm3"])  # SmolLM3: a layer with RoPE, and one without
def test_the_cache_of_a_fixed_size_stores_the_same(name: str):
    model, inputs = tiny_model(name), {"input_ids": torch.randint(3, VOCABULARY, (2, 150))}
    options = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}
    with attention(model, "mixkvq"):
        grown, fixed = (
            model.generate(**inputs, past_key_values=cache, **options)
            for cache in (
                MixKVQCache(model.config, "kvquant-4:residual_length=32,key_group=32"),
                MixKVQStaticCache(model.config, "kvquant-4:residual_length=32,key_group=32", max_tokens=1024),
            )
        )
    assert torch.equal(grown, fixed)


@pytest.mark.parametrize(
    ("config", "pairs", "interleaved"),
    [
        (tf.LlamaConfig(), 64, False),
        (tf.GemmaConfig(), 128, False),
        (tf.CohereConfig(), 64, True),
        (tf.Glm4Config(), 32, True),
        (tf.PhiConfig(), 16, False),
        (tf.Qwen3Config(), 64, False),
        (tf.Phi3Config(), 48, False),
    ],
)
def test_the_pairs_of_models(config: tf.PreTrainedConfig, pairs: int, interleaved: bool):
    rope = rope_of(config, 0)
    assert (len(rope.inv_freq), rope.interleaved) == (pairs, interleaved)
    assert rope.inv_freq[0] == 1.0


def test_a_layer_has_the_frequencies_of_its_kind():
    kind, changes = ARCHITECTURES["gemma3"]
    config = kind(**{**SIZE, **changes})
    parameters = config.rope_parameters
    for layer, layer_type in enumerate(config.layer_types):
        second = parameters[layer_type]["rope_theta"] ** (-1 / 8)
        assert rope_of(config, layer).inv_freq[1] == pytest.approx(second)
    assert len({rope_of(config, layer) for layer in range(2)}) == 2


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (tf.GPT2Config(), "it has no rotary embedding"),
        (
            tf.LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "its frequencies change with the length",
        ),
        (tf.Qwen2VLConfig(text_config={"rope_parameters": IMAGES}), "tokens of images have several positions"),
        (tf.Qwen2VLConfig(), "it is no causal language model of transformers"),
    ],
)
def test_models_whose_rope_is_not_known(config: tf.PreTrainedConfig, why: str):
    with pytest.raises(UnsupportedModelError, match=f"model is not known: {why}.*Set key_rope to 'after'"):
        MixKVQCache(config, "kivi-2:key_rope=before")
    MixKVQCache(config, "kivi-2")


@pytest.mark.parametrize(
    ("apply", "why"),
    [
        (lambda keys, cos, sin: keys, "its functions are not those of other models: .* takes 3 positional arguments"),
        (lambda query, keys, cos, sin: (query, keys * sin), "pairs of channels are neither halves nor neighbours"),
    ],
)
def test_a_model_that_turns_keys_in_its_own_way(apply, why: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", apply)
    with pytest.raises(UnsupportedModelError, match=why):
        rope_of(tf.LlamaConfig(), 0)
