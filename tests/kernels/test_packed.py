"""Attention over the packed store equals attention over its dequantized content, for every policy."""

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import MixKVQConfig
from mixkvq.kernels import packed, partial
from mixkvq.kernels.partial import causal
from mixkvq.kernels.reference import attention, dequantize_pages
from mixkvq.layers import LayerCache, Step


def oracle(cache: LayerCache, step: Step, row: int, real: torch.Tensor | None = None, **options) -> torch.Tensor:
    """Softmax attention over everything that the store holds of a sequence, dequantized, and the new tokens."""
    store = cache.store
    sinks, waiting = min(store.lengths[row], store.sinks), store._waiting(row)
    slots = [*range(sinks), *range(store.sinks, store.sinks + waiting)]
    keys, values = [store.dense_keys[row, :, slots]], [store.dense_values[row, :, slots]]
    if store.tables[row]:
        k, v = dequantize_pages(store.packed(), row, rotated=cache.rotated)
        keys, values = [*keys, k], [*values, v]
    past = sum(k.shape[1] for k in keys)
    keys, values = torch.cat([*keys, step.keys[row]], 1), torch.cat([*values, step.values[row]], 1)
    visible = causal(step.length, past + step.length, step.keys.device)
    return attention(step.query[row], keys, values, visible, **options)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("length", "new"), [(260, 1), (900, 7), (131, 150), (40, 3)])
def test_it_equals_the_oracle(config: MixKVQConfig, length: int, new: int, seed: int):
    torch.manual_seed(seed)
    past, step = random_step(2, length), random_step(2, new)
    pads = torch.tensor([0, min(length - 1, 135)])
    past = Step(past.query, past.keys, past.values, torch.arange(length) >= pads[:, None])
    cache = layer_cache(config, past)
    cache.append(past)
    output = cache.attend(step, None, scaling=0.25)
    for row in range(2):
        expected = oracle(cache, step, row, scaling=0.25)
        assert torch.allclose(output[row], expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True}])
@pytest.mark.parametrize("new", [1, 20])
def test_soft_cap_and_model_sinks(options: dict, new: int):
    options = {**options, "sinks": torch.randn(8) * 3} if "sinks" in options else options
    past, step = random_step(2, 500, heads=8), random_step(2, new, heads=8)
    cache = layer_cache(MixKVQConfig.preset("default"), past)
    cache.append(past)
    output = cache.attend(step, None, scaling=0.3, **options)
    for row in range(2):
        expected = oracle(cache, step, row, scaling=0.3, **options)
        assert torch.allclose(output[row], expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 64), (9, 3, 64), (16, 1, 128), (8, 8, 80), (6, 3, 5)])
def test_head_shapes(config: MixKVQConfig, heads: int, kv_heads: int, dim: int):
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim}
    past, step = random_step(1, 300, **shape), random_step(1, 2, **shape)
    cache = layer_cache(config, past)
    cache.append(past)
    output = cache.attend(step, None, scaling=dim**-0.5)
    assert torch.allclose(output[0], oracle(cache, step, 0, scaling=dim**-0.5), atol=3e-5, rtol=1e-4)


def test_pages_in_any_order_and_in_small_slices(config: MixKVQConfig, monkeypatch: pytest.MonkeyPatch):
    past, step = random_step(3, 800), random_step(4, 3)
    cache = layer_cache(config, past)
    cache.append(past)
    cache.select([2, 0, 2, 1])  # shared pages, not in the order of the pool
    cache.append(random_step(4, 300))
    whole = cache.attend(step, None, scaling=0.25)
    monkeypatch.setattr(packed, "MAX_UNPACKED", 1)  # a page at a time
    monkeypatch.setattr(partial, "MAX_LOGITS", 1)  # a query at a time
    assert torch.allclose(cache.attend(step, None, scaling=0.25), whole, atol=1e-5)
    for row in range(4):
        assert torch.allclose(whole[row], oracle(cache, step, row, scaling=0.25), atol=3e-5, rtol=1e-4)


def test_extreme_scales():
    for scale in (1e-4, 1e3):
        past, step = random_step(1, 400), random_step(1, 1)
        past = Step(past.query, past.keys * scale, past.values * scale)
        cache = layer_cache(MixKVQConfig.preset("default"), past)
        cache.append(past)
        expected = oracle(cache, step, 0, scaling=1e-2 / scale)
        assert torch.allclose(cache.attend(step, None, scaling=1e-2 / scale)[0], expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sequence_that_is_not_finite_leaves_the_others_alone(config: MixKVQConfig, where: str, bad: float):
    past, step = random_step(3, 400), random_step(3, 2)
    clean = layer_cache(config, past)
    clean.append(past)
    expected = clean.attend(step, None, scaling=0.25)
    getattr(past, where)[1, :, 100:] = bad
    cache = layer_cache(config, past)
    cache.append(past)
    output = cache.attend(step, None, scaling=0.25)
    for row in (0, 2):
        assert torch.allclose(output[row], expected[row], atol=1e-5)


def test_constant_channels_come_back_exactly(config: MixKVQConfig):
    step = random_step(1, 300)
    step.keys[..., 3] = 1.75
    step.values[..., :] = -0.5
    cache = layer_cache(config, step)
    cache.append(step)
    keys, values = dequantize_pages(cache.store.packed(), 0, rotated=cache.rotated)
    per_channel = config.key_axis == "channel" and config.key_rope == "after"
    if per_channel and config.key_feedback is None:  # or it makes up for the errors of others
        assert (keys[..., 3] == 1.75).all()
    if not cache.rotated:
        assert (values == -0.5).all()


def test_more_bits_are_closer():
    step = random_step(1, 1000, dim=64)
    errors = []
    for text in ("kivi-2", "kivi-2:key_bits=3", "kivi-4", "kivi-2:key_bits=8", "bf16"):
        cache = layer_cache(MixKVQConfig.parse(text), step)
        cache.append(step)
        keys, _ = dequantize_pages(cache.store.packed(), 0, rotated=False)
        errors.append((keys - step.keys[0, :, : keys.shape[1]]).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert errors[2] < errors[0] / 16
