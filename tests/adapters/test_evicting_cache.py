"""Caches that evict, in real models: positions, confidence in ``generate``, and what is refused."""

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList

from mixkvq import ConfigError, MixKVQCache, MixKVQConfig, MixKVQStaticCache, confidence_processors
from mixkvq.evaluate.fidelity import appends, fidelity
from mixkvq.models import attention
from mixkvq.policies.conf_kv import confidence
from models import VOCABULARY, tiny_model

GREEDY = {"do_sample": False, "eos_token_id": None}
ROOM = "conf-kv:keep=1000,keep_confident=1000,residual_length=512"
#: Confident at every step.
TIGHT = "conf-kv:keep=48,keep_confident=32,protected=8,residual_length=16,key_group=8,confidence=0"


@pytest.fixture
def model():
    return tiny_model("llama")


def prompt(batch: int = 1, length: int = 100) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def generate(model, ids, cache, **options):
    options = {**GREEDY, "attention_mask": torch.ones_like(ids), **options}
    with attention(model, "eager" if isinstance(cache, DynamicCache) else "mixkvq"):
        return model.generate(ids, past_key_values=cache, logits_processor=confidence_processors(cache), **options)


def held(cache: MixKVQCache) -> list[list[int]]:
    return [layer.cache.store.lengths for layer in cache.quantized_layers]


@pytest.mark.parametrize("config", [ROOM, "window-512"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 40}])
def test_with_room_for_all_it_equals_the_stock_cache(model, config: str, options: dict):
    ids = prompt(2)
    expected = generate(model, ids, DynamicCache(config=model.config), max_new_tokens=60, **options)
    cache = MixKVQCache(model.config, config)
    assert torch.equal(generate(model, ids, cache, max_new_tokens=60, **options), expected)
    assert cache.memory().evicted == 0


def window_mask(length: int, sinks: int, newest: int) -> torch.Tensor:
    """``[1, 1, T, T]``: every query sees the first tokens, ``newest`` before it, and itself."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    return ((key <= query) & ((key < sinks) | (key >= query - newest)))[None, None]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_a_window_equals_a_full_run_with_its_mask(architecture: str):
    """Token by token: evicted ones are gone, and all others are where they were."""
    model, ids = tiny_model(architecture), prompt(length=90)
    with torch.inference_mode():
        with attention(model, "sdpa"):
            expected = model(ids, attention_mask=window_mask(90, 3, 17)).logits
        with attention(model, "mixkvq"):
            cache = MixKVQCache(model.config, "window-512:keep=20,sinks=3")
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(90)]
    assert torch.allclose(torch.cat(steps, 1), expected, atol=2e-4)
    assert cache.get_seq_length() == 90
    assert held(cache) == [[20], [20]]


def test_the_prompt_is_cut_once_and_confident_steps_cut_further(model):
    cache = MixKVQCache(model.config, TIGHT)
    generate(model, prompt(2), cache, max_new_tokens=1)
    assert held(cache) == [[48, 48]] * 2
    cache.reset()
    generate(model, prompt(2), cache, max_new_tokens=4)
    # The last token that is written is not stored, and the pass before it was confident.
    assert held(cache) == [[32, 32]] * 2
    assert cache.get_seq_length() == 103
    assert cache.memory().evicted == 2 * 2 * (103 - 32) * 2 * 32


def test_each_sequence_has_its_own_confidence(model):
    config = MixKVQConfig.parse(TIGHT)
    with torch.inference_mode(), attention(model, "mixkvq"):
        cache = MixKVQCache(model.config, config.replace(confidence=0.5))
        model(prompt(2), past_key_values=cache)
        cache.observe(torch.zeros(2, 1, VOCABULARY))
        model(prompt(2, 1), past_key_values=cache)
        logits = torch.zeros(2, 1, VOCABULARY)
        logits[1, 0, 5] = 50
        assert confidence(logits).flatten().tolist() == pytest.approx([0.15 + 0.3 / VOCABULARY, 1.0])
        cache.observe(logits)
    assert held(cache) == [[48, 32]] * 2


def test_without_the_processor_no_step_is_confident(model):
    cache = MixKVQCache(model.config, TIGHT)
    with attention(model, "mixkvq"):
        model.generate(prompt(), past_key_values=cache, max_new_tokens=10, **GREEDY)
    assert held(cache) == [[48]] * 2


@pytest.mark.parametrize("cache", ["default", "window-512"])
def test_other_caches_get_no_processor(model, cache: str):
    processors = confidence_processors(MixKVQCache(model.config, cache))
    assert isinstance(processors, LogitsProcessorList)
    assert not processors
    assert not confidence_processors(DynamicCache())
    assert len(confidence_processors(MixKVQCache(model.config, "conf-kv"))) == 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_samples(model, options: dict):
    cache = MixKVQCache(model.config, TIGHT)
    out = generate(model, prompt(2), cache, max_new_tokens=30, **options)
    assert out.shape[1] == 130
    assert all(length <= 48 for lengths in held(cache) for length in lengths)


@pytest.mark.parametrize("text", ["window-512:keep=40", TIGHT])
def test_a_padded_sequence_writes_what_it_writes_alone(model, text: str):
    ids = prompt(2)
    ids[0, :35] = 0
    mask = (torch.arange(100) >= torch.tensor([35, 0])[:, None]).long()
    cache = MixKVQCache(model.config, text)
    together = generate(model, ids, cache, max_new_tokens=30, attention_mask=mask)
    alone = generate(model, ids[:1, 35:], MixKVQCache(model.config, text), max_new_tokens=30)
    assert torch.equal(together[0, 100:], alone[0, 65:])


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "gpt-oss", "smollm"])
def test_other_architectures(architecture: str):
    model = tiny_model(architecture)
    cache = MixKVQCache(model.config, TIGHT)
    generate(model, prompt(), cache, max_new_tokens=20)
    assert held(cache) == [[32]] * len(cache.quantized_layers)
    stock = DynamicCache(config=model.config)
    ids = prompt(length=40)
    expected = generate(model, ids, stock, max_new_tokens=20)
    assert torch.equal(generate(model, ids, MixKVQCache(model.config, ROOM), max_new_tokens=20), expected)


def test_later_layers_hold_less(model):
    cache = MixKVQCache(model.config, "conf-kv-l:keep=200,keep_confident=200")
    generate(model, prompt(length=300), cache, max_new_tokens=2)
    assert held(cache) == [[200], [141]]  # 200 / sqrt 2


def test_turns_on_one_cache_count_all_tokens(model):
    cache = MixKVQCache(model.config, "window-512:keep=40")
    ids = generate(model, prompt(length=70), cache, max_new_tokens=10)
    ids = torch.cat([ids, prompt(length=30)], 1)
    generate(model, ids, cache, max_new_tokens=5)
    assert cache.get_seq_length() == 114
    assert held(cache) == [[40]] * 2


@pytest.mark.parametrize("text", ["conf-kv", "window-512"])
def test_what_cannot_be_taken_back_is_refused(model, text: str):
    with pytest.raises(ConfigError, match=f"keeps all tokens, and the {text[:6]}.* policy evicts some"):
        MixKVQStaticCache(model.config, text, max_tokens=1024)
    cache = MixKVQCache(model.config, text)
    with pytest.raises(NotImplementedError, match="Assisted decoding and prompt lookup take tokens back"):
        generate(model, prompt(), cache, max_new_tokens=20, prompt_lookup_num_tokens=3)
    cache = MixKVQCache(model.config, text)
    with torch.inference_mode(), attention(model, "mixkvq"):
        model(prompt(length=600), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="88 of the 600 tokens of sequence 0 were evicted"):
        cache.crop(-3)


def test_where_one_layer_cannot_be_cropped_none_is(model):
    cache = MixKVQCache(model.config, "conf-kv-l:keep=128,keep_confident=128,protected=8")
    generate(model, prompt(length=110), cache, max_new_tokens=2)
    assert [len(lengths) for lengths in held(cache)] == [1, 1]
    assert held(cache)[0][0] == 111 > held(cache)[1][0]  # the second layer keeps 96
    with pytest.raises(NotImplementedError, match="were evicted and do not come back"):
        cache.crop(-3)
    assert held(cache)[0] == [111]
    assert {layer.get_seq_length() for layer in cache.layers} == {111}


def test_what_is_protected_is_kept_in_every_layer(model):
    cache = MixKVQCache(model.config, "conf-kv-l:protected=160")
    assert [layer.config.keep_confident for layer in cache.quantized_layers] == [256, 181]
    cache = MixKVQCache(model.config, "conf-kv-l:protected=200")
    assert [layer.config.keep_confident for layer in cache.quantized_layers] == [256, 200]


def test_fidelity_feeds_small_pieces_with_the_models_own_confidence(model):
    window = prompt(length=300)
    assert appends(50, MixKVQConfig.preset("conf-kv")) == [(0, 16), (16, 32), (32, 48), (48, 50)]
    configs = {"low": TIGHT.replace("confidence=0", "confidence=1"), "high": TIGHT}
    low, high = fidelity(model, window, {name: MixKVQConfig.parse(text) for name, text in configs.items()})[::-1]
    assert (low.cache, high.cache) == ("low", "high")
    assert low.sized_by_all
    assert low.bits_held > low.size_bits > high.size_bits  # a window in float32 counts as one in 16 bits
    with torch.inference_mode(), attention(model, "mixkvq"):
        cache = MixKVQCache(model.config, TIGHT)
        for t in range(300):
            cache.observe(model(window[:, t : t + 1], past_key_values=cache).logits)
    assert held(cache) == [[32]] * 2
    assert high.bytes_held == pytest.approx(cache.memory().total, rel=0.15)
