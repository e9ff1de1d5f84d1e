"""KVmix's profile: the paper's formulas on small examples, and gradients against autograd's."""

import pytest
import torch
import torch.nn.functional as F

from mixkvq import MixKVQConfig
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.kvmix import gradient_norms
from mixkvq.calibrate.trials import Trials
from mixkvq.evaluate.fidelity import fidelity
from mixkvq.policies.kvmix import allocate_layers
from models import VOCABULARY, tiny_model


def test_a_fifth_of_the_layers_is_wide():
    # Ten layers: two get 3-bit keys, two others 4-bit values; a tie goes to the earlier layer.
    keys = dict(enumerate([1.0, 9, 2, 3, 3, 3, 9, 1, 1, 1]))
    values = dict(enumerate([5.0, 1, 4, 1, 5, 5, 1, 1, 1, 1]))
    fields = allocate_layers(keys, values)
    assert {layer for layer, own in fields.items() if own.get("key_bits") == 3} == {1, 6}
    assert {layer for layer, own in fields.items() if own.get("value_bits") == 4} == {0, 4}


def test_thirty_two_layers_as_in_the_paper():
    norms = {layer: float(layer) for layer in range(32)}
    fields = allocate_layers(norms, norms)
    assert [layer for layer, own in fields.items() if own] == [26, 27, 28, 29, 30, 31]
    widths = [own.get("key_bits", 2) for own in fields.values()], [own.get("value_bits", 2) for own in fields.values()]
    assert [round(sum(part) / 32, 2) for part in widths] == [2.19, 2.38]


def test_norms_are_those_of_the_loss():
    model, prompts = tiny_model("llama"), torch.randint(3, VOCABULARY, (3, 40))
    keys, values = gradient_norms(model, prompts, Trials(None, {}))
    wanted = 0.0
    for prompt in prompts:
        loss = F.cross_entropy(model(prompt[None], use_cache=False).logits[0, :-1], prompt[1:])
        wanted += float(torch.autograd.grad(loss, model.model.layers[1].self_attn.v_proj.weight)[0].norm()) / 3
    assert values[1] == pytest.approx(wanted, rel=1e-4)
    assert keys.keys() == values.keys() == {0, 1}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_profile_is_better_than_two_bits_and_takes_more():
    model, texts = tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 400))
    profile = MixKVQConfig.preset("kvmix", layers=[{"key_bits": 3}, {"value_bits": 4}])
    two, mixed = fidelity(model, texts, {"kivi-2": MixKVQConfig.preset("kivi-2"), "profile": profile})
    assert (two.cache, mixed.cache) == ("kivi-2", "profile")
    assert mixed.kl < two.kl
    assert mixed.key_bits_codes == 2.5


def test_models_without_such_projections_are_refused():
    prompts = torch.randint(3, VOCABULARY, (1, 20))
    for name in ("phi3", "gpt-neox"):
        with pytest.raises(CalibrationError, match=r"layer 0 of this .* model has no such linear layers"):
            gradient_norms(tiny_model(name), prompts, Trials(None, {}))
    model = tiny_model("qwen2")
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.requires_grad_(False)
    try:
        with pytest.raises(CalibrationError, match="needs gradients of the weights"):
            gradient_norms(model, prompts, Trials(None, {}))
    finally:
        weight.requires_grad_(True)
