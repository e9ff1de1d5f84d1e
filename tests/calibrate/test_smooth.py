"""SmoothAttention: the model stays what it is, and its keys become easier to quantize per token."""

import copy

import pytest
import torch
from transformers import GraniteConfig, PreTrainedModel

from mixkvq import MixKVQConfig
from mixkvq.calibrate.capture import record
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.smooth import ALPHAS, fold, pair_sizes, smooth_attention
from mixkvq.evaluate.fidelity import appends, fidelity
from mixkvq.kernels.partial import causal
from mixkvq.kernels.reference import attention as attend
from models import SIZE, VOCABULARY, random_model, tiny_model

CONFIG = MixKVQConfig.preset("pm-kvq-2", key_axis="token", residual_length=32, plan_tokens=320)


def own_model(architecture: str) -> PreTrainedModel:
    """A tiny model that may be changed: others have theirs from a cache."""
    return copy.deepcopy(tiny_model(architecture))


def granite(multiplier: float) -> PreTrainedModel:
    """A tiny model that scales logits by ``multiplier``, which is 1/4 elsewhere at this head dimension."""
    return random_model(GraniteConfig(**SIZE, attention_multiplier=multiplier))


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


@pytest.mark.parametrize("architecture", ["granite", "gemma2", "gpt-oss"])  # scalings, soft caps and sinks of their own
def test_a_tape_attends_as_the_model_does(architecture: str):
    model = granite(multiplier=0.6) if architecture == "granite" else tiny_model(architecture)
    text, exact = torch.randint(3, VOCABULARY, (100,)), []
    projection = model.model.layers[-1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, inputs: exact.append(inputs[0][0].detach()))
    model(text[None], use_cache=False)
    hook.remove()
    tape = record(model, text, 1, appends(len(text), CONFIG), None)[-1]
    output = attend(tape.query[-1], tape.keys[-1], tape.values[-1], causal(100, 100, text.device), **tape.attention[-1])
    torch.testing.assert_close(output.transpose(0, 1).flatten(1), exact[0], rtol=1e-4, atol=1e-4)


def test_exponents_are_those_of_what_the_model_computes():
    """Whether logits are large by their scaling or by the weights is the same to a model, and to its exponents."""
    by_scaling, by_weights = granite(multiplier=1.0), granite(multiplier=1 / 16)
    for model in (by_scaling, by_weights):
        for layer in model.model.layers:
            fold(layer.self_attn.q_proj, layer.self_attn.k_proj, torch.logspace(-1, 0.5, 16).view(2, 8))
    for layer in by_weights.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(16)
    text = torch.randint(3, VOCABULARY, (320,))
    assert smooth_attention(by_scaling, text, CONFIG) == smooth_attention(by_weights, text, CONFIG)


def test_models_that_it_cannot_be_folded_into():
    text = torch.randint(3, VOCABULARY, (320,))
    with pytest.raises(CalibrationError, match="layer 0 of this qwen3 model has no such linear layers"):
        smooth_attention(own_model("qwen3"), text, CONFIG)


def test_a_rotary_embedding_with_other_pairs(monkeypatch: pytest.MonkeyPatch):
    model, text = own_model("llama"), torch.randint(3, VOCABULARY, (320,))
    monkeypatch.setattr("mixkvq.calibrate.smooth.fold", lambda query, key, by: key.weight.data.mul_(3))
    with pytest.raises(CalibrationError, match="changed this llama model's logits by"):
        smooth_attention(model, text, CONFIG)
