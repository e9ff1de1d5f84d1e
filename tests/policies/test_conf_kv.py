"""CONF-KV's formulas and the sliding window: worked by hand."""

import math

import pytest
import torch

from mixkvq import ConfigError, MixKVQConfig
from mixkvq.policies import policy_class
from mixkvq.policies.conf_kv import confidence, layer_budget, normalised
from mixkvq.policies.evicting import EvictingPolicy, held_after, moving_average


def policy(text: str) -> EvictingPolicy:
    config = MixKVQConfig.parse(text)
    made = policy_class(config.policy)(config)
    assert isinstance(made, EvictingPolicy)
    return made


def test_confidence_by_hand():
    # p = 1/2, 1/4, 1/4, 0: H = ln 2 / 2 + ln 4 / 2 = 1.5 ln 2 of log V = 2 ln 2; the margin is ln 2, sigmoid 2/3.
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0]).log()
    assert confidence(logits).item() == pytest.approx(0.4 * (1 - 0.75) + 0.3 * 2 / 3 + 0.3 * 0.5)


def test_confidence_from_even_to_certain():
    even, certain = torch.zeros(8), torch.tensor([200.0, *[0.0] * 7])
    assert confidence(torch.stack([even, certain])).tolist() == pytest.approx([0.3 * 0.5 + 0.3 / 8, 1.0])
    assert confidence(even + 5) == confidence(even)


def test_confidence_of_half_precision_and_ruled_out_tokens_is_a_number():
    logits = torch.randn(2, 3, 50).half()
    logits[..., 7] = float("-inf")
    found = confidence(logits)
    assert found.shape == (2, 3)
    assert found.dtype == torch.float32
    assert bool(((found > 0) & (found < 1)).all())


def test_the_budget_follows_the_confidence():
    conf = policy("conf-kv:keep=400,keep_confident=300,confidence=0.6")
    assert [conf.budget(c) for c in (None, 0.1, 0.59, 0.6, 1.0)] == [400, 400, 400, 300, 300]
    assert policy("window-512").budget(1.0) == 512


def test_held_tokens_grow_one_by_one_and_are_cut_at_once():
    assert held_after(10, []) == 10
    assert held_after(10, [12, 12, 12, 12]) == 12
    assert held_after(12, [8]) == 8
    assert held_after(12, [12, 8, 12, 12]) == 10


def test_later_layers_keep_less():
    # 512 * .5^(l / L): 512, 512 / sqrt 2 = 362.04, 256 and never below 96.
    assert [layer_budget(512, 0.5, index, 4) for index in (0, 2, 4)] == [512, 362, 256]
    assert layer_budget(128, 0.5, 3, 4) == 96
    config = MixKVQConfig.preset("conf-kv-l")
    last = policy_class("conf-kv").for_layer(config, 3, 4)
    assert (last.keep, last.keep_confident, last.keep_decay) == (304, 152, 1.0)  # .5^(3/4) = .5946
    plain = MixKVQConfig.preset("conf-kv")
    assert policy_class("conf-kv").for_layer(plain, 3, 4) == plain


def test_the_moving_average_in_one_go():
    masses, average = [3.0, 5.0, 2.0], 7.0
    expected = average
    for mass in masses:
        expected = 0.9 * expected + 0.1 * mass
    weights = moving_average(3, 0.9, torch.device("cpu"))
    assert weights.tolist() == pytest.approx([0.081, 0.09, 0.1])
    assert average * 0.9**3 + (weights @ torch.tensor(masses)).item() == pytest.approx(expected)


def test_normalised_over_the_free_tokens():
    free = torch.tensor([True, True, True, False])
    assert normalised(torch.tensor([2.0, 4.0, 3.0, 9.0]), free)[:3].tolist() == [0.0, 1.0, 0.5]
    assert normalised(torch.full((4,), 2.0), free).tolist() == [0.0] * 4


def test_rank_and_survivors_of_conf_kv():
    conf = policy("conf-kv:keep=8,keep_confident=4,protected=2,mass_share=0.75")
    steps, mass = torch.arange(7), torch.tensor([0.8, 0.0, 0.4, 0.1, 0.2, 0.0, 0.0])
    # free are 0 to 4: a / .8 and step / 4, 3 to 1: .75 + 0, 0 + .0625, .375 + .125, .09375 + .1875, .1875 + .25
    rank = conf.rank(steps, mass, torch.arange(7) < 5)
    assert rank[:5].tolist() == pytest.approx([0.75, 0.0625, 0.5, 0.28125, 0.4375])
    assert conf.survivors(steps, mass, 7, 5).tolist() == [0, 2, 4, 5, 6]
    assert conf.survivors(steps, mass, 7, 3).tolist() == [0, 5, 6]
    # Of equal ones the older go first.
    assert conf.survivors(steps, torch.zeros(7), 7, 4).tolist() == [3, 4, 5, 6]


def test_sinks_are_never_evicted():
    conf = policy("conf-kv:keep=8,keep_confident=4,protected=2,sinks=1,mass_share=1")
    mass = torch.tensor([0.0, 0.1, 0.3, 0.2, 0.0, 0.0])
    assert conf.survivors(torch.arange(6), mass, 6, 4).tolist() == [0, 2, 4, 5]


def test_a_window_keeps_the_first_and_the_newest():
    window = policy("window-512:keep=5,sinks=2")
    assert window.survivors(torch.arange(9), None, 9, 5).tolist() == [0, 1, 6, 7, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conf-kv:keep=none", "conf-kv policy needs keep, the tokens"),
        ("conf-kv:keep=0", "keep is a whole number of tokens, at least 1"),
        ("conf-kv:keep_confident=none", "needs keep_confident"),
        ("conf-kv:keep=63", r"keep is at least 64, the sinks and newest tokens .* keep=63 was given"),
        ("conf-kv:keep_confident=63", r"lies between 64 \(.*\) and keep \(512\); keep_confident=63"),
        ("conf-kv:keep_confident=513", r"and keep \(512\); keep_confident=513"),
        ("conf-kv-l:keep_confident=95", "lies between 96"),
        ("conf-kv:keep_decay=0", "keep_decay is above 0 and at most 1"),
        ("conf-kv:confidence=1.1", "confidence lies between 0 and 1"),
        ("conf-kv:mass_share=-1", "mass_share lies between 0 and 1"),
        ("conf-kv:protected=0", "protected is a whole number of tokens, at least 1"),
        ("conf-kv:key_bits=4", "stores keys and values in 8 bits outside the window, or .* key_bits=4, value_bits=8"),
        ("conf-kv:key_clip=true", "conf-kv policy has no key_clip"),
        ("conf-kv:value_rotation=hadamard", "conf-kv policy has no value_rotation"),
        ("conf-kv:budget=8", "budget lies between"),
        ("window-512:keep=4", "keep is at least 5"),
        ("window-512:keep_confident=128", "window policy has no keep_confident, which is for conf-kv"),
        ("default:keep=512", "mixkvq policy has no keep, which is for conf-kv, window: leave it out"),
        ("kivi-2:keep_decay=0.5", "kivi policy has no keep_decay, which is for conf-kv"),
    ],
)
def test_contradictions_are_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        MixKVQConfig.parse(text)


def test_a_probability_of_one_leaves_no_entropy():
    assert math.isclose(confidence(torch.tensor([0.0, float("-inf"), float("-inf")])).item(), 1.0)
