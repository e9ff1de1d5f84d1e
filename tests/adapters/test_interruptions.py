"""A forward pass that fails or is interrupted leaves a cache that goes on as if nothing had come, or says reset()."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel

from mixkvq import CacheFullError, MixKVQCache, MixKVQStaticCache, UnsupportedModelError
from mixkvq.adapters.transformers.layer import MixKVQLayer
from mixkvq.adapters.transformers.static_layer import MixKVQStaticLayer
from mixkvq.layers import ModelCache
from mixkvq.models import attention
from mixkvq.store import PagedStore
from mixkvq.store.static import StaticStore
from models import SIZE, VOCABULARY, tiny_model

KINDS = ["growing", "static"]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def ids(batch: int = 1, length: int = 20) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def new_cache(kind: str, config, max_tokens: int = 1024) -> MixKVQCache | MixKVQStaticCache:
    return MixKVQCache(config) if kind == "growing" else MixKVQStaticCache(config, max_tokens=max_tokens)


def read(model: PreTrainedModel, tokens: torch.Tensor, cache, **arguments) -> torch.Tensor:
    with torch.no_grad(), attention(model, "mixkvq"):
        return model(tokens, past_key_values=cache, **arguments).logits


def interrupted(monkeypatch: pytest.MonkeyPatch, where: type, method: str, model, tokens, cache, call: int = 1) -> None:
    """A pass in which the given call of a method is cut off by Ctrl-C."""
    real, calls = getattr(where, method), 0

    def stop(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, method, stop)
        with pytest.raises(KeyboardInterrupt):
            read(model, tokens, cache)


def assert_says_reset(model: PreTrainedModel, cache) -> None:
    for length in (1, 5):
        with pytest.raises(ValueError, match=r"reset\(\)"):
            read(model, ids(length=length), cache)
    cache.reset()
    tokens = ids(length=200)
    fresh = MixKVQCache(model.config)
    for part in (tokens[:, :150], tokens[:, 150:151], tokens[:, 151:]):
        assert torch.allclose(read(model, part, cache), read(model, part, fresh), atol=1e-2)  # rounding ties


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_another_size_counts_for_nothing(model: PreTrainedModel, kind: str):
    text, cache, other = ids(2, 30), new_cache(kind, model.config), new_cache(kind, model.config)
    read(model, text[:, :20], cache)
    read(model, text[:, :20], other)
    for length in (1, 3, 20):
        with pytest.raises(ValueError, match="holds a batch of 2 and was given one of 3"):
            read(model, ids(3, length), cache)
    assert cache.get_seq_length() == 20
    assert torch.equal(read(model, text[:, 20:21], cache), read(model, text[:, 20:21], other))


def test_a_tree_of_drafts_counts_for_nothing(model: PreTrainedModel):
    cache = MixKVQStaticCache(model.config, max_tokens=1024)
    read(model, ids(), cache)
    mask = torch.ones(1, 1, 3, 23, dtype=torch.bool)
    mask[..., 20:] = torch.eye(3, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError):
        read(model, ids(length=3), cache, attention_mask=mask)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("length", [1, 5, 30])
@pytest.mark.parametrize(("kind", "layer"), [("growing", MixKVQLayer), ("static", MixKVQStaticLayer)])
def test_an_interruption_before_anything_is_stored(monkeypatch, model: PreTrainedModel, kind: str, layer, length: int):
    cache, other = new_cache(kind, model.config), new_cache(kind, model.config)
    text, tokens = ids(), ids(length=length)
    read(model, text, cache)
    read(model, text, other)
    interrupted(monkeypatch, layer, "attend", model, tokens, cache)
    assert cache.get_seq_length() == 20
    assert torch.equal(read(model, tokens, cache), read(model, tokens, other))


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("length", [1, 5, 200])
def test_a_growing_layer_that_was_not_finished(monkeypatch, model: PreTrainedModel, length: int, call: int):
    cache = MixKVQCache(model.config)
    read(model, ids(), cache)
    interrupted(monkeypatch, PagedStore, "append", model, ids(length=length), cache, call)
    assert_says_reset(model, cache)


@pytest.mark.parametrize(("length", "where", "method"), [
    (1, StaticStore, "advance"), (5, StaticStore, "shift"), (200, StaticStore, "settle"), (30, ModelCache, "append"),
])  # fmt: skip
def test_a_static_layer_that_was_not_finished(monkeypatch, model: PreTrainedModel, length: int, where, method: str):
    cache = MixKVQStaticCache(model.config, max_tokens=1024)
    read(model, ids(length=150), cache)
    interrupted(monkeypatch, where, method, model, ids(length=length), cache, 2 if where is ModelCache else 1)
    assert_says_reset(model, cache)
    assert cache.state.cache._past == (None, [])


def test_a_first_prompt_that_was_interrupted(monkeypatch, model: PreTrainedModel):
    cache = MixKVQStaticCache(model.config, max_tokens=1024)
    interrupted(monkeypatch, ModelCache, "append", model, ids(), cache, 2)
    assert_says_reset(model, cache)


def test_a_static_cache_for_more_layers(model: PreTrainedModel):
    cache = MixKVQStaticCache(tf.LlamaConfig(**{**SIZE, "num_hidden_layers": 3}), max_tokens=1024)
    read(model, ids(), cache)
    with pytest.raises(ValueError, match=r"turn of layer 2.*built for another model"):
        read(model, ids(), cache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["gemma3", "cohere2"])
def test_sliding_windows_that_took_a_pass_alone(monkeypatch, architecture: str, kind: str):
    model = tiny_model(architecture)
    cache, layer = new_cache(kind, model.config), MixKVQLayer if kind == "growing" else MixKVQStaticLayer
    read(model, ids(), cache)
    interrupted(monkeypatch, layer, "attend", model, ids(length=1), cache)
    assert_says_reset(model, cache)


def test_sliding_windows_took_a_prompt_that_does_not_fit():
    model = tiny_model("gemma3")
    cache = MixKVQStaticCache(model.config, max_tokens=128)
    with pytest.raises(CacheFullError):
        read(model, ids(length=400), cache)
    assert_says_reset(model, cache)


def test_nothing_of_the_last_batch_is_left_after_reset(model: PreTrainedModel):
    cache = MixKVQStaticCache(model.config, max_tokens=1024)
    with torch.no_grad(), attention(model, "mixkvq"):
        model(inputs_embeds=torch.full((2, 40, 64), float("nan")), past_key_values=cache)
    cache.reset()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :10] = 0
    read(model, ids(2), cache, attention_mask=mask[:, :20])
    assert read(model, ids(2), cache, attention_mask=mask).isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_copies_go_their_own_way(architecture: str):
    model, text, tokens = tiny_model(architecture), ids(2, 200), ids(2, 150)
    cache, other = MixKVQStaticCache(model.config, max_tokens=1024), MixKVQStaticCache(model.config, max_tokens=1024)
    read(model, text, cache)
    read(model, text, other)
    copied = copy.deepcopy(cache)
    for at in range(tokens.shape[1]):
        one = tokens[:, at : at + 1]
        assert torch.equal(read(model, one, copied), read(model, one, other))
    assert cache.get_seq_length() == 200
    assert copied.get_seq_length() == other.get_seq_length() == 350
    assert cache.memory().elements < copied.memory().elements == other.memory().elements
