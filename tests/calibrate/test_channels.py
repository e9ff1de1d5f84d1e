"""Frozen channels: chosen by mean salience, promoted in every block."""

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import ConfigError, MixKVQConfig
from mixkvq.calibrate.channels import frozen_channels, mean_saliences
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.layers import with_layers
from mixkvq.evaluate.fidelity import fidelity
from mixkvq.layers.expected import fits_fixed
from mixkvq.layers.recipe import LayerShape, Recipe
from mixkvq.policies import KeyBlock, policy_class
from models import VOCABULARY, tiny_model

BASE = MixKVQConfig.preset("default", residual_length=32, key_group=32, budget=2.5)
FIELDS = {"policy": "frozen", "budget": None}


def test_the_most_salient_of_a_layer_by_hand():
    # Eight channels at a mean of 2.5 bits: two get 4.
    saliences = {3: torch.tensor([[0.1, 9, 0.2, 0.3], [0.1, 0.2, 0.3, 8]]), 4: torch.tensor([[5.0, 6, 0, 0], [1] * 4])}
    fields = frozen_channels(saliences, BASE)
    assert fields[3] == {**FIELDS, "channels": ((1,), (3,))}
    assert fields[4] == {**FIELDS, "channels": ((0, 1), ())}


def test_heads_that_rank_their_own():
    saliences = {0: torch.tensor([[0.1, 9, 7, 0.3], [0.1, 0.2, 0.3, 0.4]])}
    assert frozen_channels(saliences, BASE)[0]["channels"] == ((1, 2), ())
    assert frozen_channels(saliences, BASE.replace(budget_scope="head"))[0]["channels"] == ((1,), (3,))


def test_every_block_gets_them():
    config = BASE.replace(**FIELDS, channels=[[1, 5], []])
    policy = policy_class("frozen")(config)
    bits = policy.plan(KeyBlock(torch.randn(3, 2, 32, 8), None))
    assert bits.tolist() == [[[2, 4, 2, 2, 2, 4, 2, 2], [2] * 8]] * 3
    assert policy.promoted_channels(2, 8) == {4: 2}
    recipe = Recipe.of(config, policy, LayerShape(2, 8, 8, torch.float32))
    assert recipe.plan(torch.randn(3, 2, 32, 8), None).is_contiguous()  # as kernels read it
    assert not fits_fixed(config, torch.device("cpu"))
    cache = layer_cache(config, step := random_step(2, 100))
    cache.append(step)
    assert cache.memory().key_bits_codes == 2 + 2 * 2 / 32
    assert MixKVQConfig.from_json(config.to_json()) == config


def test_from_a_text_to_a_cache():
    model, texts = tiny_model("llama"), torch.randint(3, VOCABULARY, (2, 200))
    saliences = mean_saliences(model, texts, BASE)
    assert {layer: list(each.shape) for layer, each in saliences.items()} == {0: [2, 16], 1: [2, 16]}
    config = with_layers(BASE, frozen_channels(saliences, BASE), model)
    chosen, least = config, with_layers(BASE, frozen_channels({k: -v for k, v in saliences.items()}, BASE), model)
    best, worst = fidelity(model, texts, {"chosen": chosen, "least salient": least})
    assert best.bits == worst.bits
    assert best.kl < worst.kl


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": None}, "needs channels"),
        ({"channels": [[0, 0], []]}, "channels is none, or for every KV head a list of channel numbers, each once"),
        ({"channels": 3}, "channels is none, or for every KV head"),
        ({"channels": [[0], []], "budget": 2.5}, "frozen policy has no budget"),
        ({"channels": [[0], []], "key_bits": 3}, "promotes channels above key_bits=2, not 3"),
        ({"channels": [[0], []], "policy": "kivi"}, "kivi policy has no channels, which is for frozen"),
    ],
)
def test_bad_channels(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        BASE.replace(**{**FIELDS, **changes})


def test_channels_of_another_shape():
    step = random_step(1, 40)
    for channels in ([[0]], [[0], [16]]):
        with pytest.raises(ConfigError, match="not those of a layer with 2 KV heads of dimension 16"):
            layer_cache(BASE.replace(**FIELDS, channels=channels), step).append(step)


def test_caches_that_rank_no_channels():
    model, texts = tiny_model("llama"), torch.randint(3, VOCABULARY, (1, 200))
    for base in (MixKVQConfig.preset("kivi-2"), MixKVQConfig.preset("paper"), BASE.replace(layers=[{}])):
        with pytest.raises(CalibrationError, match="ranks them within a budget, such as default"):
            mean_saliences(model, texts, base)
    with pytest.raises(CalibrationError, match="Windows of 20 tokens do not hold 4 sinks and a block of 32"):
        mean_saliences(model, texts[:, :20], BASE)
