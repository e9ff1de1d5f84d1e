"""Settings by layer: every layer stores as its own configuration says, in both caches."""

import pytest
import torch

from mixkvq import CacheFullError, ConfigError, MixKVQCache, MixKVQConfig, MixKVQStaticCache
from mixkvq.adapters.transformers.support import model_shape
from mixkvq.layers.recipe import LayerShape, Recipe
from mixkvq.models import attention
from mixkvq.policies import policy_class
from models import VOCABULARY, tiny_model

OWN = ({"budget": 3.5}, {"policy": "kivi", "budget": None, "key_bits": 4, "value_bits": 4})


def by_layer(*fields: dict, **shared) -> MixKVQConfig:
    return MixKVQConfig.preset("default", residual_length=32, key_group=32, layers=fields, **shared)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
def test_layers_with_equal_settings_are_the_plain_cache(architecture: str):
    model, tokens = tiny_model(architecture), torch.randint(3, VOCABULARY, (1, 150))
    plain, own = by_layer(), by_layer({"budget": 2.84}, {"budget": 2.84})
    with attention(model, "mixkvq"), torch.inference_mode():
        outputs = [
            model(tokens, past_key_values=cache).logits
            for cache in (MixKVQCache(model.config, plain), MixKVQCache(model.config, own))
        ]
    assert torch.equal(*outputs)


def test_every_layer_holds_what_its_own_configuration_holds():
    model, tokens = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 150))
    mixed = by_layer(*OWN)
    caches = [MixKVQCache(model.config, config) for config in (mixed, mixed.for_layer(0), mixed.for_layer(1))]
    with attention(model, "mixkvq"), torch.inference_mode():
        for cache in caches:
            model(tokens, past_key_values=cache)
    held, first, second = ([layer.memory() for layer in cache.quantized_layers] for cache in caches)
    assert held[0].parts == first[0].parts
    assert held[1].parts == second[1].parts
    assert held[0].bits != held[1].bits


@pytest.mark.parametrize("pads", [None, (0, 41)])
def test_the_static_cache_gives_the_tokens_of_the_growing_one(pads: tuple[int, int] | None):
    model, tokens = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 100))
    inputs = {"input_ids": tokens}
    if pads is not None:
        inputs["attention_mask"] = (torch.arange(100) >= torch.tensor(pads)[:, None]).long()
    written = []
    caches = [
        MixKVQCache(model.config, by_layer(*OWN)),
        MixKVQStaticCache(model.config, by_layer(*OWN), max_tokens=1024),
    ]
    with attention(model, "mixkvq"):
        for cache in caches:
            options = {"max_new_tokens": 70, "do_sample": False, "eos_token_id": None, "disable_compile": True}
            written.append(model.generate(**inputs, past_key_values=cache, **options))
    assert torch.equal(*written)
    growing, static = (cache.memory() for cache in caches)
    for part in ("key codes", "value codes", "key scales", "tier index"):
        assert growing.parts[part] == static.parts[part]
    assert growing.bits == static.bits


def test_a_static_cache_by_layer_is_used_again_and_fills_up():
    model, tokens = tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 60))
    cache = MixKVQStaticCache(model.config, by_layer(*OWN), max_tokens=64)
    with attention(model, "mixkvq"), torch.inference_mode():
        first = model(tokens, past_key_values=cache).logits
        with pytest.raises(CacheFullError, match="The cache is full"):
            model(torch.randint(3, VOCABULARY, (1, 100)), past_key_values=cache)
        cache.reset()
        assert torch.equal(first, model(tokens, past_key_values=cache).logits)


def test_an_interrupted_pass_between_groups_is_noticed(monkeypatch: pytest.MonkeyPatch):
    model, token = tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 1))
    cache = MixKVQStaticCache(model.config, by_layer(*OWN), max_tokens=1024)
    with attention(model, "mixkvq"), torch.inference_mode():
        model(torch.randint(3, VOCABULARY, (1, 60)), past_key_values=cache)
        second = cache.state.cache.groups[1]
        with monkeypatch.context() as patch:
            patch.setattr(second, "decode", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(token, past_key_values=cache)
        with pytest.raises(ValueError, match="interrupted"):
            model(token, past_key_values=cache)


def test_bytes_are_not_divided_between_groups():
    with pytest.raises(ValueError, match="give the cache max_tokens"):
        MixKVQStaticCache(tiny_model("llama").config, by_layer(*OWN), max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"budgett": 3}], r"layers\[0\]: There is no field 'budgett'. Did you mean 'budget'"),
        ([{}, {"sinks": 8}], r"layers\[1\]: sinks is the same for all layers"),
        ([{"budget": 9}], r"layers\[0\]: budget lies between"),
        ([3], r"layers\[0\] is a mapping of fields; 3 was given"),
    ],
)
def test_bad_settings_by_layer(layers: list, message: str):
    with pytest.raises(ConfigError, match=message):
        MixKVQConfig.preset("default", layers=layers)


def test_other_models_are_refused():
    config = tiny_model("llama").config
    with pytest.raises(ConfigError, match="settings for 3 layers, and this model has 2"):
        MixKVQCache(config, by_layer({}, {}, {}))
    other = by_layer({}, {}, model=model_shape(tiny_model("qwen3").config))
    with pytest.raises(ConfigError, match=r"calibrated for another model: qwen3 of 2 layers.*This one is a llama"):
        MixKVQCache(config, other)
    with pytest.raises(ConfigError, match="policy of your own, or settings by layer"):
        MixKVQCache(config, by_layer({}, {}), policy=policy_class("mixkvq")(by_layer()))
    with pytest.raises(ConfigError, match="settings of one layer"):
        Recipe.of(by_layer({}, {}), policy_class("mixkvq")(by_layer()), LayerShape(2, 16, 16, torch.float32))


def test_configurations_by_layer_travel_as_json():
    config = by_layer(*OWN, model="a model")
    assert MixKVQConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(MixKVQConfig.from_json(config.to_json()))
    assert config.for_layer(1).key_bits == 4
    assert config.for_layer(1).layers == ()
