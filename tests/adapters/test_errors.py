"""What cannot be served says so."""

import logging
from collections.abc import Iterator

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from mixkvq import MixKVQCache, UnsupportedModelError
from mixkvq.models import attention
from models import SIZE, VOCABULARY, tiny_model


@pytest.fixture
def model():
    return tiny_model("llama")


def ids(batch: int = 1, length: int = 20) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def test_attention_implementation_left_out(model):
    with attention(model, "sdpa"), pytest.raises(UnsupportedModelError, match="attn_implementation='mixkvq'"):
        model(ids(), past_key_values=MixKVQCache(model.config))


def test_multi_head_latent_attention():
    with pytest.raises(UnsupportedModelError, match="multi-head latent attention"):
        MixKVQCache(tf.DeepseekV3Config())


def test_a_model_outside_the_attention_interface():
    falcon = tf.AutoModelForCausalLM.from_config(tf.FalconConfig(**{**SIZE, "num_kv_heads": 2}))
    with pytest.raises(UnsupportedModelError, match="does not go through transformers' attention interface"):
        falcon(ids(), past_key_values=MixKVQCache(falcon.config))


def test_encoder_decoders():
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        MixKVQCache(tf.T5Config())


def test_a_model_without_full_attention():
    config = tf.MistralConfig(**SIZE, sliding_window=32)
    with pytest.raises(UnsupportedModelError, match="nothing to quantize"):
        MixKVQCache(config)


def test_a_model_instead_of_its_configuration(model):
    with pytest.raises(TypeError, match=r"model\.config"):
        MixKVQCache(model)


def test_a_cache_for_fewer_layers(model):
    cache = MixKVQCache(tf.LlamaConfig(**{**SIZE, "num_hidden_layers": 1}))
    with attention(model, "mixkvq"), pytest.raises(ValueError, match="layer 1, but this cache was built for one of 1"):
        model(ids(), past_key_values=cache)


def test_a_cache_for_more_layers(model):
    cache = MixKVQCache(tf.LlamaConfig(**{**SIZE, "num_hidden_layers": 3}))
    with torch.inference_mode(), attention(model, "mixkvq"):
        model(ids(), past_key_values=cache)
        with pytest.raises(ValueError, match="Not all of this cache's 3 layers got tokens"):
            model(ids(), past_key_values=cache)


def test_a_mask_for_the_whole_batch(model):
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[:, 0] = False  # the first position is padding in every row
    with torch.inference_mode(), attention(model, "mixkvq"):
        cache = MixKVQCache(model.config)
        model(ids(3, 5), past_key_values=cache, attention_mask=mask[None, None])
    assert cache.layers[0].cache.store.lengths == [4, 4, 4]


def test_a_cache_for_another_shape(model):
    cache = MixKVQCache(tf.LlamaConfig(**{**SIZE, "head_dim": 32}))
    with attention(model, "mixkvq"), pytest.raises(ValueError, match=r"dimension 32, and was given keys of 2 heads"):
        model(ids(), past_key_values=cache)


def test_another_batch_size(model):
    cache = MixKVQCache(model.config)
    with attention(model, "mixkvq"):
        model(ids(2), past_key_values=cache)
        with pytest.raises(ValueError, match="holds a batch of 2 and was given one of 3"):
            model(ids(3), past_key_values=cache)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the attention function logs, whatever it has said in other tests."""
    tf.utils.logging.warning_once.cache_clear()
    logger = logging.getLogger("mixkvq.adapters.transformers.attention")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_stock_cache_is_warned_about_once(model, warned: pytest.LogCaptureFixture):
    tf.utils.logging.get_logger("mixkvq").propagate = True
    with torch.inference_mode(), attention(model, "mixkvq"):
        cache = DynamicCache(config=model.config)
        expected = model(ids(), past_key_values=DynamicCache(config=model.config)).logits
        for _ in range(4):
            model(ids(), past_key_values=cache)
    assert expected.isfinite().all()
    warnings = [record for record in warned.records if "nothing is being quantized" in record.message]
    assert len({id(record) for record in warnings}) == 1


@pytest.mark.parametrize("architecture", ["gemma3", "gpt-oss"])
def test_sliding_layers_are_not_warned_about(architecture: str, warned: pytest.LogCaptureFixture):
    hybrid = tiny_model(architecture)
    with torch.inference_mode(), attention(hybrid, "mixkvq"):
        cache = MixKVQCache(hybrid.config)
        for _ in range(3):
            hybrid(ids(), past_key_values=cache)
    assert not warned.records


def test_rows_that_do_not_exist(model):
    cache = MixKVQCache(model.config)
    with attention(model, "mixkvq"):
        model(ids(batch=2), past_key_values=cache)
    with pytest.raises(IndexError, match=r"Rows \[0, 5\] of a batch of 2: they are -2 to 1"):
        cache.batch_select_indices(torch.tensor([0, 5]))
    cache.batch_select_indices(torch.tensor([-1]))
    assert cache.quantized_layers[0].cache.store.batch == 1


def test_positive_crops(model):
    with pytest.raises(ValueError, match="negative integer"):
        MixKVQCache(model.config).crop(5)


def test_debug_names_what_is_not_finite(model):
    cache = MixKVQCache(model.config, "default:debug=true")
    with torch.inference_mode(), attention(model, "mixkvq"):
        model(ids(), past_key_values=cache)
        embeddings = torch.full((1, 1, 64), float("nan"))
        with pytest.raises(FloatingPointError, match="NaN or infinity in its keys"):
            model(inputs_embeds=embeddings, past_key_values=cache)


def test_without_debug_the_rest_of_the_batch_is_served(model):
    clean, dirty = MixKVQCache(model.config), MixKVQCache(model.config)
    with torch.inference_mode(), attention(model, "mixkvq"):
        embeddings = model.get_input_embeddings()(ids(3, 300))
        model(inputs_embeds=embeddings, past_key_values=clean)
        embeddings[1, 50] = float("nan")
        model(inputs_embeds=embeddings, past_key_values=dirty)
        token = ids(3, 1)
        expected, logits = (model(token, past_key_values=cache).logits for cache in (clean, dirty))
    assert torch.allclose(logits[[0, 2]], expected[[0, 2]], atol=1e-5)
    assert not logits[1].isfinite().all()


def test_debug_finds_masks_that_hide_the_past(model):
    cache = MixKVQCache(model.config, "default:debug=true")
    with torch.inference_mode(), attention(model, "mixkvq"):
        model(ids(), past_key_values=cache)
        hidden = torch.ones(1, 1, 2, 22, dtype=torch.bool)
        hidden[..., 0, 21] = False
        model(ids(length=2), past_key_values=cache, attention_mask=hidden)
        hidden = torch.ones(1, 1, 2, 24, dtype=torch.bool)
        hidden[..., 3] = False
        with pytest.raises(UnsupportedModelError, match="hides tokens that are already in the cache"):
            model(ids(length=2), past_key_values=cache, attention_mask=hidden)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 4, 5, 5, dtype=torch.bool), r"masks of shape \[batch, 1, queries, keys\]"),
        (torch.linspace(-3, 0, 25).view(1, 1, 5, 5), "does not take attention biases"),
    ],
)
def test_masks_by_head_and_biases(model, mask: torch.Tensor, message: str):
    with attention(model, "mixkvq"), pytest.raises(UnsupportedModelError, match=message):
        model(ids(length=5), past_key_values=MixKVQCache(model.config), attention_mask=mask)


def test_additive_masks_are_read(model):
    prompt = ids(2, 5)
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -1e38)
    with torch.inference_mode(), attention(model, "mixkvq"):
        expected = model(prompt, past_key_values=MixKVQCache(model.config)).logits
        masked = model(prompt, past_key_values=MixKVQCache(model.config), attention_mask=additive).logits
    assert torch.allclose(masked, expected, atol=1e-5)


def test_a_handle_refuses_everything_else(model):
    layer = MixKVQCache(model.config).layers[0]
    keys, _ = layer.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))
    assert keys.shape == (1, 2, 3, 16)
    assert keys.dtype == torch.float32
    for misuse in (
        lambda: keys.transpose(1, 2),
        lambda: keys[0],
        lambda: keys @ keys,
        lambda: torch.matmul(torch.randn(3, 3), keys),
        lambda: keys.sum(),
    ):
        with pytest.raises(
            UnsupportedModelError, match="works on keys or values where the packed cache has no tensors"
        ):
            misuse()


def test_handles_used_twice(model):
    cache = MixKVQCache(model.config)
    keys, values = cache.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), 0)
    forward = tf.AttentionInterface._global_mapping["mixkvq"]
    module, query = model.model.layers[0].self_attn, torch.randn(1, 4, 3, 16)
    forward(module, query, keys, values, None)
    with pytest.raises(UnsupportedModelError, match="reached the attention function twice"):
        forward(module, query, keys, values, None)
