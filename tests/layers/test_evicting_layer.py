"""The layer that evicts: attention over exactly what is held, the mass, budgets, and what is refused."""

import copy

import pytest
import torch

from conftest import random_step
from mixkvq import ConfigError, MixKVQConfig
from mixkvq.kernels.reference import attention_weights
from mixkvq.layers import EvictingCache, LayerCache, Step, new_layer_cache
from mixkvq.policies import policy_class

SMALL = "conf-kv:keep=24,keep_confident=16,protected=8,residual_length=16,key_group=16,key_bits=16,value_bits=16"
PACKED = "conf-kv:keep=64,keep_confident=48,protected=8,residual_length=16,key_group=8"


def new_cache(text: str, step: Step) -> EvictingCache:
    config = MixKVQConfig.parse(text)
    cache = new_layer_cache(config, policy_class(config.policy)(config), step)
    assert isinstance(cache, EvictingCache)
    return cache


def feed(cache: EvictingCache, step: Step, size: int = 1) -> torch.Tensor:
    outputs = []
    for start in range(0, step.length, size):
        part = step.tokens(start, min(start + size, step.length))
        outputs.append(cache.attend(part, None, scaling=0.25))
        cache.append(part)
    return torch.cat(outputs, 2)


def full_weights(step: Step, row: int) -> torch.Tensor:
    """``[Hq, T, T]`` logits as weights of a full run."""
    visible = torch.ones(step.length, step.length, dtype=torch.bool).tril()
    return attention_weights(step.query[row], step.keys[row], visible, scaling=0.25)


def test_attention_equals_a_full_run_over_the_survivors():
    step = random_step(1, 60)
    cache = new_cache(SMALL, step)
    group = 2
    for t in range(60):
        held = cache.store.rows[0].steps.tolist()
        new = step.tokens(t, t + 1)
        output = cache.attend(new, None, scaling=0.25)
        chosen = [*held, t]
        keys = step.keys[0, :, chosen].repeat_interleave(group, 0)
        values = step.values[0, :, chosen].repeat_interleave(group, 0)
        logits = (step.query[0, :, t : t + 1] @ keys.transpose(1, 2)) * 0.25
        assert torch.allclose(output[0], logits.softmax(-1) @ values, atol=1e-6)
        cache.append(new)
    assert len(held) == 24


def test_the_mass_is_the_moving_average_of_a_full_run():
    step = random_step(2, 20)
    cache = new_cache(SMALL, step)
    feed(cache, step)
    whole = new_cache(SMALL, step)
    whole.weigh(step, None, scaling=0.25)
    whole.append(step)
    for row in range(2):
        average = torch.zeros(20)
        for weights in full_weights(step, row).mean(0):  # one query after the other
            average = 0.9 * average + 0.1 * weights
        for each in (cache, whole):
            assert torch.allclose(each.store.rows[row].mass, average, atol=1e-6)


def test_only_the_newest_queries_of_a_long_prompt_need_weighing():
    step = random_step(1, 700)
    cache, other = (new_cache("conf-kv:keep=1000,keep_confident=1000", step) for _ in range(2))
    cache.weigh(step, None, scaling=0.25)
    cache.append(step)
    feed(other, step, 700)
    assert torch.allclose(cache.store.rows[0].mass, other.store.rows[0].mass, atol=1e-7)


def test_pieces_and_tokens_with_room_for_all_give_the_same():
    step = random_step(1, 100)
    config = "conf-kv:keep=200,keep_confident=200,residual_length=32,key_bits=16,value_bits=16"
    whole, pieces = (feed(new_cache(config, step), step, size) for size in (100, 7))
    assert torch.allclose(whole, pieces, atol=1e-5)
    assert torch.allclose(whole[0], full_weights(step, 0) @ step.values[0].repeat_interleave(2, 0), atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 80])
def test_no_more_than_the_budget_is_held_and_confidence_cuts_further(size: int):
    step = random_step(2, 300)
    cache = new_cache(PACKED, step)
    feed(cache, step, size)
    assert cache.store.lengths == [64, 64]
    last = random_step(2, 1)
    feed(cache, last)
    cache.observe([[0.9], [0.2]])
    assert cache.store.lengths == [48, 64]
    feed(cache, last)
    cache.observe([[0.2], [0.2]])
    assert cache.store.lengths == [49, 64]
    feed(cache, random_step(2, 4), 4)
    cache.observe([[0.2, 0.9, 0.2, 0.2], [0.2] * 4])
    assert cache.store.lengths == [50, 64]


def test_the_confidence_of_one_token_of_a_prompt_cuts_nothing():
    step = random_step(1, 100)
    cache = new_cache(PACKED, step)
    feed(cache, step, 100)
    cache.observe([[1.0]])
    assert cache.store.lengths == [64]


def test_the_newest_tokens_stay_in_the_models_type():
    step = random_step(1, 200)
    cache = new_cache(PACKED, step)
    feed(cache, step, 10)
    row = cache.store.rows[0]
    assert row.packed.length > 0
    assert 16 <= row.keys.shape[1] < 16 + 8
    assert torch.equal(row.keys[:, -16:], step.keys[0, :, -16:])
    found, _ = row.dequantize()
    true = step.keys[0, :, row.steps.long()]
    assert torch.allclose(found, true, atol=true.abs().max().item() / 127)


def test_a_padded_batch_holds_what_each_sequence_holds_alone():
    step = random_step(3, 150)
    pads = torch.tensor([0, 37, 148])
    real = torch.arange(150) >= pads[:, None]
    step = Step(step.query, step.keys, step.values, real)
    visible = torch.ones(150, 150, dtype=torch.bool).tril() & real[:, None, :]
    together = new_cache(PACKED, step)
    outputs = together.attend(step, visible, scaling=0.25)
    together.append(step)
    for row, pad in enumerate(pads.tolist()):
        part = Step(*(x[row : row + 1, :, pad:] for x in (step.query, step.keys, step.values)))
        alone = new_cache(PACKED, part)
        assert torch.allclose(feed(alone, part, 150)[0], outputs[row, :, pad:], atol=1e-5)
        for a, b in zip(together.store.rows[row].parts(), alone.store.rows[0].parts(), strict=True):
            assert torch.allclose(a[1].float(), b[1].float(), atol=1e-6)
    assert together.store.lengths == [64, 64, 2]


def test_selected_rows_go_their_own_ways():
    step = random_step(2, 100)
    cache = new_cache(PACKED, step)
    feed(cache, step, 100)
    first = cache.store.rows[0]
    cache.select([1, 0, 0])
    feed(cache, random_step(3, 1))
    cache.observe([[0.0], [0.9], [0.0]])
    assert cache.store.lengths == [64, 48, 64]
    assert cache.store.rows[1].seen == 101
    assert first.seen == 100


def test_crop_before_and_after_eviction():
    step = random_step(1, 80)
    cache, shorter = new_cache(PACKED, step), new_cache(PACKED, step)
    feed(cache, step.tokens(0, 50), 50)
    cache.crop([10])
    feed(shorter, step.tokens(0, 40), 40)
    assert cache.store.rows[0].steps.sort().values.tolist() == list(range(40))
    next_token = step.tokens(50, 51)
    a, b = (each.attend(next_token, None, scaling=0.25) for each in (cache, shorter))
    assert torch.allclose(a, b, atol=0.05)  # more of them were packed before they were taken back
    feed(cache, step, 80)
    with pytest.raises(NotImplementedError, match="56 of the 120 tokens of sequence 0 were evicted"):
        cache.crop([1])
    cache.crop([0])


def test_appending_before_attention_is_refused():
    step = random_step(1, 10)
    with pytest.raises(RuntimeError, match=r"call attend\(\) or weigh\(\) first"):
        new_cache(SMALL, step).append(step)
    window = new_cache("window-512", step)
    window.append(step)
    assert window.store.rows[0].mass is None


def test_settings_by_layer_and_pages_are_refused():
    step, config = random_step(1, 10), MixKVQConfig.preset("conf-kv")
    policy = policy_class("conf-kv")(config)
    with pytest.raises(ConfigError, match="evicts tokens, and pages keep all: use MixKVQCache"):
        LayerCache(config, policy, step)
    with pytest.raises(ConfigError, match="settings of one layer"):
        EvictingCache(config.replace(layers=[{}]), policy, step)


def test_soft_caps_and_attention_sinks():
    step = random_step(1, 30)
    cache = new_cache(SMALL, step)
    sinks = torch.randn(4)
    output = cache.attend(step, None, scaling=0.25, softcap=3.0, sinks=sinks)
    visible = torch.ones(30, 30, dtype=torch.bool).tril()
    weights = attention_weights(step.query[0], step.keys[0], visible, scaling=0.25, softcap=3.0, sinks=sinks)
    assert torch.allclose(output[0], weights @ step.values[0].repeat_interleave(2, 0), atol=1e-6)
    assert bool((weights.sum(-1) < 1).all())


def test_no_gradients_are_kept_and_copies_can_be_made():
    step = random_step(1, 30)
    step = Step(*(x.requires_grad_() for x in (step.query, step.keys, step.values)))
    cache = new_cache(SMALL, step)
    feed(cache, step, 30)
    assert not any(tensor.requires_grad for tensor in cache.store.tensors())
    copy.deepcopy(cache)


def test_a_sequence_that_is_not_finite_leaves_the_others_alone():
    step = random_step(2, 100)
    clean = new_cache(PACKED, step)
    feed(clean, step, 10)
    step.keys[1, :, 40] = float("nan")
    dirty = new_cache(PACKED, step)
    feed(dirty, step, 10)
    assert dirty.store.lengths == [64, 64]
    assert torch.equal(dirty.store.rows[0].keys, clean.store.rows[0].keys)
