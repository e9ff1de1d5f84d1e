"""PM-KVQ's cache: what it holds as it grows, that codes never come back from floats, and where it ends."""

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import ConfigError, MixKVQConfig
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers.narrowing import NarrowingCache
from mixkvq.policies.pm_kvq import WIDTHS
from mixkvq.quant.narrow import narrow_codes
from mixkvq.quant.planes import join_planes, unpack
from mixkvq.store.books import CacheFullError

CONFIG = MixKVQConfig.preset("pm-kvq-2", residual_length=32, key_group=32, plan_tokens=512)


def codes(cache: NarrowingCache, part: str, dim: int) -> torch.Tensor:
    """Codes of all pages, unpacked."""
    fields = cache.store.pages.fields()
    planes = [unpack(fields[f"{part}_plane_{i}"].contiguous(), 2, dim) for i in range(cache.width // 2)]
    return join_planes(planes, cache.width)[cache.store.tables[0]]


def held(cache: NarrowingCache) -> int:
    return cache.store.pages.data.nbytes


def test_a_layer_is_as_wide_as_its_budget_allows_and_never_over_it():
    step = random_step(2, 513)
    cache = layer_cache(CONFIG, step)
    assert isinstance(cache, NarrowingCache)
    pages = {width: cache.stages[width].layout.page.nbytes for width in WIDTHS}
    assert cache.budget == 16 * pages[2]
    seen = []
    for at in range(513):
        cache.append(step.tokens(at, at + 1))
        assert held(cache) <= 2 * cache.budget
        full = max(at, 0) // 32  # one sink
        widest = next(width for width in WIDTHS if full * pages[width] <= cache.budget)
        assert cache.width == widest
        seen.append(cache.width)
    assert list(dict.fromkeys(seen)) == [16, 8, 4, 2]
    with pytest.raises(CacheFullError, match=r"planned for 512 tokens of each sequence at 2 bits.*larger plan_tokens"):
        cache.append(random_step(2, 32))
    assert cache.store.lengths == [513, 513]


def test_narrowing_is_the_integer_formula_on_the_codes_that_are_held():
    step = random_step(1, 513)
    cache = layer_cache(CONFIG, step)
    compared = 0
    for at in range(0, 513, 32):
        before = None
        if cache.width < 16:
            before = cache.width, codes(cache, "key", -2), codes(cache, "value", -1), len(cache.store.tables[0])
        cache.append(step.tokens(at, min(at + 32, 513)))
        if before is not None and before[0] != cache.width:
            width, keys, values, count = before
            assert torch.equal(codes(cache, "key", -2)[:count], narrow_codes(keys, width))
            assert torch.equal(codes(cache, "value", -1)[:count], narrow_codes(values, width))
            compared += 1
    assert compared == 2


def test_codes_do_not_depend_on_when_tokens_came():
    """Old pages are narrowed where they lie, new ones by the same steps: a prompt at once holds the same bytes."""
    step = random_step(2, 400)
    whole, grown = layer_cache(CONFIG, step), layer_cache(CONFIG, step)
    whole.append(step)
    for at in range(0, 400, 50):
        grown.append(step.tokens(at, at + 50))
    assert whole.width == grown.width < 16
    for row in range(2):
        for a, b in zip(dequantize(whole, row), dequantize(grown, row), strict=True):
            assert torch.equal(a, b)


def dequantize(cache: NarrowingCache, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    pages = cache.store.packed()
    assert pages is not None
    return dequantize_pages(pages, row, rotated=cache.rotated)


def test_errors_are_within_a_step_and_a_half_of_the_grid():
    step = random_step(1, 513)
    cache = layer_cache(CONFIG, step)
    cache.append(step)
    keys, values = dequantize(cache, 0)
    fields = cache.store.pages.fields()
    steps = fields["key_scale"][cache.store.tables[0]].float().transpose(0, 1).flatten(1, 2).repeat_interleave(32, 1)
    assert ((keys - step.keys[0, :, 1:]).abs() <= 0.55 * steps + 1e-2).all()
    assert (values - step.values[0, :, 1:]).abs().max() < 2


def test_16_bits_are_exact_and_sequences_come_and_go():
    config = CONFIG.replace(plan_tokens=8192)
    step = random_step(2, 300)
    cache = layer_cache(config, step)
    cache.append(step)
    assert cache.width == 16
    assert torch.equal(dequantize(cache, 1)[0], step.keys[1, :, 1:289])
    cache.select([1, 1, 0])
    cache.crop([20, 0, 0])
    cache.append(random_step(3, 40))
    assert cache.store.lengths == [320, 340, 340]
    report = cache.memory()
    assert report.bits == 32  # float32 pages


def test_a_wide_last_width_stays():
    step = random_step(1, 200)
    cache = layer_cache(CONFIG.replace(key_bits=8, value_bits=8, plan_tokens=224), step)
    cache.append(step)
    assert cache.width == 8
    assert cache.memory().bits == 8 + (2 * 16 / 32 + 2 * 16 / 16) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_bits": 4}, "one width for keys and values, the last of 16, 8, 4, 2"),
        ({"key_bits": 3, "value_bits": 3}, "key_bits=3 and value_bits=3 were given"),
        ({"plan_tokens": None}, "needs plan_tokens"),
        ({"plan_tokens": 16}, r"plan_tokens is .* at least residual_length \(32\)"),
        ({"key_feedback": 0.2}, "leave key_feedback out"),
        ({"budget": 3.0}, "pm-kvq policy has no budget"),
        ({"outliers": 0.01}, "leave outliers, key_levels and value_levels out"),
    ],
)
def test_bad_configurations(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        CONFIG.replace(**changes)
