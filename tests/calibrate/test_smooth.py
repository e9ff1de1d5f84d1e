"""SmoothAttention: the model stays what it is, and its keys become easier to quantize per token."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from mixkvq import MixKVQConfig
from mixkvq.calibrate.capture import record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.smooth import ALPHAS, fold, pair_sizes, smooth_attention
from mixkvq.evaluate.fidelity import appends, fidelity
from models import VOCABULARY, tiny_model

CONFIG = MixKVQConfig.preset("pm-kvq-2", key_axis="token", residual_length=32, plan_tokens=320)


def own_model(architecture: str) -> PreTrainedModel:
    """A tiny model that may be changed: others have theirs from a cache."""
    return copy.deepcopy(tiny_model(architecture))


def first_keys(model, text: torch.Tensor) -> torch.Tensor:
    """The first layer's, ``[Hkv, T, D]``."""
    (tape,) = record(model, text, 1, appends(len(text), CONFIG), None)
    return tape.keys[0].clone()


def test_pair_sizes_by_hand():
    keys = torch.tensor([[[1.0, -2, 0, 3], [-4, 1, 2, 1]]])  # one head, two tokens, D = 4: pairs (0, 2) and (1, 3)
    assert pair_sizes(keys).tolist() == [[4, 3]]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2 has biases
def test_the_model_stays_what_it_is(architecture: str):
    model, text = own_model(architecture), torch.randint(3, VOCABULARY, (320,))
    before = model(text[None]).logits
    attention = model.model.layers[0].self_attn
    heads = attention.k_proj.out_features // attention.head_dim
    factors = torch.rand(heads, attention.head_dim // 2) * 5 + 0.1
    old = first_keys(model, text)
    fold(attention.q_proj, attention.k_proj, factors)
    torch.testing.assert_close(model(text[None]).logits, before, rtol=1e-4, atol=1e-4)
    new = first_keys(model, text)
    torch.testing.assert_close(new * torch.cat([factors, factors], 1)[:, None], old, rtol=1e-4, atol=1e-4)


def test_keys_with_large_channels_become_easier():
    model, texts = own_model("llama"), torch.randint(3, VOCABULARY, (2, 320))
    for layer in model.model.layers:
        factors = torch.ones(2, 8)
        factors[:, 2] = 0.05  # this pair of keys is twenty times as large
        fold(layer.self_attn.q_proj, layer.self_attn.k_proj, factors)
    before = model(texts).logits
    rough = fidelity(model, texts, {"rough": CONFIG})[0].kl
    alphas = smooth_attention(model, texts[0], CONFIG)
    assert alphas.keys() == {0, 1}
    assert set(alphas.values()) <= set(ALPHAS)
    torch.testing.assert_close(model(texts).logits, before, rtol=1e-3, atol=1e-3)
    assert fidelity(model, texts, {"smooth": CONFIG})[0].kl < 0.8 * rough


def test_models_that_it_cannot_be_folded_into():
    text = torch.randint(3, VOCABULARY, (320,))
    with pytest.raises(CalibrationError, match="layer 0 of this qwen3 model has no such linear layers"):
        smooth_attention(own_model("qwen3"), text, CONFIG)


def test_a_rotary_embedding_with_other_pairs(monkeypatch: pytest.MonkeyPatch):
    model, text = own_model("llama"), torch.randint(3, VOCABULARY, (320,))
    monkeypatch.setattr("mixkvq.calibrate.smooth.fold", lambda query, key, by: key.weight.data.mul_(3))
    with pytest.raises(CalibrationError, match="changed this llama model's logits by"):
        smooth_attention(model, text, CONFIG)
