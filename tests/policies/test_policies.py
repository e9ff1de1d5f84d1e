"""What the policies decide: worked by hand."""

import pytest
import torch

from mixkvq import MixKVQConfig
from mixkvq.policies import POLICIES, KeyBlock, policy_class
from mixkvq.policies.tiers import promote_above, promote_top, promoted_count


def plan(text: str, keys: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    config = MixKVQConfig.parse(text)
    return policy_class(config.policy)(config).plan(KeyBlock(keys, importance))


def test_thresholds_are_exclusive_and_the_widest_tier_wins():
    score = torch.tensor([[[0.5, 1.0, 1.5, 2.0, 9.0]]])
    assert promote_above(score, 2, {4: 1.0, 16: 2.0}).tolist() == [[[2, 2, 4, 4, 16]]]
    # tau_uint4 above tau_bf16, as the paper has it for Qwen-14B: nothing is left for 4 bits
    assert promote_above(score, 2, {4: 1.6, 16: 1.2}).tolist() == [[[2, 2, 16, 16, 16]]]


def test_a_budget_by_layer_or_by_head():
    score = torch.tensor([[[9.0, 8.0, 7.0, 0.0], [3.0, 2.0, 1.0, 0.0]]])
    assert promote_top(score, 2, 2.5, "layer").tolist() == [[[4, 4, 2, 2], [2, 2, 2, 2]]]
    assert promote_top(score, 2, 2.5, "head").tolist() == [[[4, 2, 2, 2], [4, 2, 2, 2]]]


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("budget", [2.0, 2.25, 2.3, 2.667, 4.0])
def test_the_count_is_what_the_budget_affords(scope: str, budget: float):
    bits = promote_top(torch.rand(3, 4, 64), 2, budget, scope)
    count = promoted_count(4, 64, 2, budget, scope)
    assert (bits == 4).flatten(1).sum(1).tolist() == [count] * 3
    assert bits.float().mean() <= budget + 1e-6
    assert bits.float().mean() > budget - 2 * 4 / 256  # less than one channel of every head short


def test_mixkvq_multiplies_importance_and_sensitivity():
    keys = torch.zeros(1, 1, 128, 4)
    keys[..., 0] = torch.linspace(0, 9, 128)  # wide, unused
    keys[..., 1] = torch.linspace(0, 3, 128)  # narrower, used
    importance = torch.tensor([[[0.1, 2.0, 5.0, 5.0]]])
    assert plan("default:budget=2.5", keys, importance).tolist() == [[[2, 4, 2, 2]]]
    assert plan("default:budget=2.5,salience=error", keys).tolist() == [[[4, 2, 2, 2]]]
    # S = range / 3 = 3 and 1, over groups of 32 a quarter of that; A = 0.1 * 0.74 and 2 * 0.25
    assert plan("paper:tau_uint4=0.3,tau_bf16=0.6", keys, importance).tolist() == [[[2, 4, 2, 2]]]
    assert plan("paper:tau_uint4=0.05,tau_bf16=0.3", keys, importance).tolist() == [[[4, 16, 2, 2]]]


def test_kitty_looks_at_magnitude_alone():
    keys = torch.zeros(1, 1, 128, 8)
    keys[..., 3] = -5.0  # constant, yet the largest
    keys[..., 5] = torch.linspace(-2, 2, 128)
    assert plan("kitty", keys).tolist() == [[[2, 2, 2, 4, 2, 2, 2, 2]]]
    assert plan("kitty-pro", keys).tolist() == [[[2, 2, 2, 4, 2, 4, 2, 2]]]


@pytest.mark.parametrize(("name", "bits"), [("kivi-2", 2), ("kivi-4", 4), ("bf16", 16)])
def test_uniform_policies(name: str, bits: int):
    assert (plan(name, torch.randn(2, 2, 128, 8)) == bits).all()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_policy_says_what_it_is(policy: type):
    assert policy.__doc__
    for name, preset in policy.presets.items():
        assert preset.summary
        assert preset.source
        assert MixKVQConfig.preset(name).policy == policy.name


def test_promised_counts_are_kept():
    keys, importance = torch.randn(2, 3, 128, 24), torch.rand(2, 3, 24)
    for name in ("default", "kitty", "kitty-pro", "kivi-4"):
        config = MixKVQConfig.preset(name)
        policy = policy_class(config.policy)(config)
        bits = policy.plan(KeyBlock(keys, importance))
        promised = policy.promoted_channels(3, 24)
        assert promised is not None
        for width in policy.promoted_bits:
            assert (bits == width).flatten(1).sum(1).tolist() == [promised[width]] * 2
