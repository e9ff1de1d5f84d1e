"""Pages, residual, sinks and block table: who holds what, and for how long."""

import torch

from conftest import layer_cache, random_step, tokens
from mixkvq import MixKVQConfig
from mixkvq.layers import LayerCache, Step
from mixkvq.store.memory import PACKED_PARTS


def filled(config: MixKVQConfig | str, *lengths: int, batch: int = 2, **shape: int) -> LayerCache:
    cache = None
    for length in lengths:
        step = random_step(batch, length, **shape)
        if isinstance(config, str):
            config = MixKVQConfig.parse(config)
        cache = cache or layer_cache(config, step)
        cache.append(step)
    assert cache is not None
    return cache


def test_life_of_a_token(config: MixKVQConfig):
    size, sinks = config.residual_length, config.sinks
    cache = filled(config.replace(recent=0.0), sinks + 2 * size - 1)
    assert [len(table) for table in cache.store.tables] == [1, 1]
    cache.append(random_step(2, 1))
    assert [len(table) for table in cache.store.tables] == [2, 2]
    assert cache.store._waiting(0) == 0


def test_unquantized_pages_hold_every_token_in_order():
    step = random_step(2, 700)
    cache = layer_cache(MixKVQConfig.parse("bf16:sinks=5"), step)
    for start, stop in ((0, 3), (3, 4), (4, 300), (300, 301), (301, 700)):
        cache.append(step.tokens(start, stop))
    for row in range(2):
        keys, values = tokens(cache, row)
        assert torch.equal(keys, step.keys[row])
        assert torch.equal(values, step.values[row])


def test_appends_of_any_size_store_the_same_bytes():
    step = random_step(2, 400)
    text = "kivi-2:sinks=3"  # no query statistics, which depend on when a block was flushed
    whole = layer_cache(MixKVQConfig.parse(text), step)
    whole.append(step)
    single = layer_cache(MixKVQConfig.parse(text), step)
    for token in range(400):
        single.append(step.tokens(token, token + 1))
    for row in range(2):
        for a, b in zip(tokens(whole, row), tokens(single, row), strict=True):
            assert torch.equal(a, b)


def test_a_padded_batch_stores_what_each_sequence_stores_alone(config: MixKVQConfig):
    step = random_step(3, 500)
    pads = torch.tensor([0, 37, 480])
    step = Step(step.query, step.keys, step.values, torch.arange(500) >= pads[:, None])
    together = layer_cache(config, step)
    together.append(step)
    for row, pad in enumerate(pads.tolist()):
        part = Step(*(x[row : row + 1, :, pad:] for x in (step.query, step.keys, step.values)))
        alone = layer_cache(config, part)
        alone.append(part)
        assert together.store.lengths[row] == alone.store.lengths[0] == 500 - pad
        for a, b in zip(tokens(together, row), tokens(alone, 0), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_selected_rows_share_pages():
    cache = filled("default", 600)
    before = [tokens(cache, row) for row in range(2)]
    pages = cache.store.pages.used
    cache.select([1, 0, 0, 1])
    assert cache.store.pages.used == pages
    for row, old in enumerate([1, 0, 0, 1]):
        for a, b in zip(tokens(cache, row), before[old], strict=True):
            assert torch.equal(a, b)
    cache.append(random_step(4, 200))  # they part here: 600 - 4 = 4 pages and 84 tokens, 200 more make 2 pages
    assert cache.store.pages.used == pages + 2 * 4


def test_memory_is_given_back():
    cache = filled("paper:tau_uint4=1.2,tau_bf16=2", 1000, batch=4)
    before, held = [tokens(cache, row) for row in range(4)], cache.memory().total
    cache.select([2])
    assert cache.memory().total < held / 3
    for a, b in zip(tokens(cache, 0), before[2], strict=True):
        assert torch.equal(a, b)


def test_pages_of_dropped_sequences_are_used_again():
    cache = filled("paper:tau_uint4=1.2,tau_bf16=2", 600, batch=2)
    for _ in range(6):
        cache.select([0, 0])
        keep = tokens(cache, 0)
        cache.append(random_step(2, 128))
        for a, b in zip(tokens(cache, 0), keep, strict=True):
            assert torch.equal(a[:, : b.shape[1] - cache.store._waiting(0)][:, :512], b[:, :512])
    pool = cache.store.pages
    assert pool.capacity <= 1.1 * pool.used + 4


def test_crop_inside_the_residual_is_exact(config: MixKVQConfig):
    length = config.sinks + 2 * config.residual_length - 1
    step = random_step(1, length)
    cache = layer_cache(config, step)
    cache.append(step.tokens(0, length - 9))
    expected = tokens(cache, 0)
    cache.append(step.tokens(length - 9, length))
    cache.crop([9])
    for a, b in zip(tokens(cache, 0), expected, strict=True):
        assert torch.equal(a, b)


def test_crop_through_a_page_keeps_what_was_stored(config: MixKVQConfig):
    step = random_step(2, 700)
    cache = layer_cache(config, step)
    cache.append(step)
    before = [tokens(cache, row) for row in range(2)]
    cache.crop([333, 0])
    assert cache.store.lengths == [367, 700]
    for row, length in enumerate((367, 700)):
        for a, b in zip(tokens(cache, row), before[row], strict=True):
            assert torch.allclose(a, b[:, :length], atol=1e-5)
    cache.append(random_step(2, 300))
    assert cache.store.lengths == [667, 1000]


def test_crop_to_nothing_and_on():
    cache = filled("default", 300, batch=1)
    cache.crop([300])
    assert cache.store.lengths == [0]
    assert cache.store.pages.used == 0
    step = random_step(1, 50)
    cache.append(step)
    assert torch.equal(tokens(cache, 0)[0], step.keys[0])


def test_predicted_and_held_bytes_agree(config: MixKVQConfig):
    config = config.replace(recent=0.0)
    step = random_step(2, config.sinks + 5 * config.residual_length, dim=32)
    cache = layer_cache(config, step)
    cache.append(step)
    store, report = cache.store, cache.memory()
    assert report.total == sum(t.nbytes for t in store.tensors()) + report.parts["statistics"]
    predicted = 10 * store.layout.page.nbytes + sum(
        pool.used * record.nbytes
        for pool, record in zip(store.chunks.values(), store.layout.chunks.values(), strict=True)
    )
    packed = sum(report.parts[part] for part in PACKED_PARTS)
    assert packed == predicted
    promised = cache.policy.promoted_channels(2, 32)
    if promised is not None:
        assert packed == 10 * sum(store.layout.part_bytes(promised).values())


def test_uneven_tiers_cost_what_they_hold():
    """Thresholds promote different numbers of channels by head and block; nobody pays for the worst of them."""
    step = random_step(1, 20 * 128, kv_heads=8, heads=8, dim=128, dtype=torch.bfloat16)
    step.keys.mul_(torch.logspace(-1, 0.5, 8).view(1, 8, 1, 1))
    cache = layer_cache(MixKVQConfig.parse("paper:tau_uint4=1.5,tau_bf16=6"), step)
    cache.append(step)
    store, report = cache.store, cache.memory()
    lanes = {bits: store._promoted(bits) for bits in (4, 16)}
    per_head = store.pages.fields()["first_lane_4"].long().diff(dim=1)
    assert per_head.min() == 0
    assert per_head.max() > 40
    tiers = 20 * 8 * 128 * 128 * 2 // 8 + lanes[4] * 128 * 2 // 8 + lanes[16] * 128 * 2
    tiers += report.parts["key scales"] + report.parts["value codes"] + report.parts["value scales"]
    held = report.total - report.parts["residual"] - report.parts["statistics"]
    assert held <= 1.03 * tiers
    assert report.key_bits_codes < 8
    assert report.key_code_bits == 2 * report.packed_keys + 128 * (2 * lanes[4] + 14 * lanes[16])


def test_growing_token_by_token_leaves_little_spare():
    step = random_step(1, 128 * 40, dim=32)
    cache = layer_cache(MixKVQConfig.parse("default"), step)
    for start in range(0, 128 * 40, 128):
        cache.append(step.tokens(start, start + 128))
    report = cache.memory()
    assert report.parts["spare"] <= 0.06 * report.total
