"""The newest share of the context, which stays in the residual (KVmix's recent pivotal context)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from conftest import layer_cache, random_step, tokens
from mixkvq import ConfigError, MixKVQCache, MixKVQConfig, MixKVQStaticCache
from mixkvq.layers import LayerCache, Step
from mixkvq.layers.expected import expected_kernel, fits_fixed
from mixkvq.models import attention
from mixkvq.policies import policy_class
from mixkvq.store.recent import RecentTokens
from models import VOCABULARY, tiny_model

#: Wide layers keep twice the share: .2 of the context here.
EXACT = "kvmix:key_bits=16,value_bits=16,recent=0.1,residual_length=16,key_group=16"
NARROW = "kvmix:recent=0.2,residual_length=16,key_group=16"


def stored(text: str, step: Step, sizes: list[int]) -> LayerCache:
    """A cache that got a step in appends of the given sizes."""
    cache = layer_cache(MixKVQConfig.parse(text), step)
    start = 0
    for size in sizes:
        cache.append(step.tokens(start, start + size))
        start += size
    assert start == step.length
    return cache


def blocks(cache: LayerCache) -> list[int]:
    return [len(table) for table in cache.store.tables]


def test_a_share_of_the_context_by_hand():
    rule = RecentTokens(0.2)
    # 100 tokens: 20 stay, 80 are 5 blocks of 16. One fewer, and 20 stay (19.8, rounded up) and 79 are 4.
    assert rule.blocks_to_pack(100, 100, 16) == 5
    assert rule.blocks_to_pack(99, 99, 16) == 4
    # Of 200 tokens 40 stay; with 5 blocks packed the residual has 120, of which 80 are 5 more.
    assert rule.blocks_to_pack(120, 200, 16) == 5
    # After a crop there may be less than the share.
    assert rule.blocks_to_pack(10, 100, 16) == 0


def test_a_share_of_the_residual_by_hand():
    rule = RecentTokens(0.2, of="residual")
    assert rule.blocks_to_pack(100, 100, 16) == 5
    # 20 are left and 20 come: 8 of 40 stay, whatever the context is, and 32 are 2 blocks.
    assert rule.blocks_to_pack(40, 120, 16) == 2
    assert rule.blocks_to_pack(19, 1000, 16) == 0  # 4 stay, 15 are no block
    assert rule.blocks_to_pack(20, 1000, 16) == 1


def test_without_a_share_complete_blocks_are_packed():
    for of in ("context", "residual"):
        assert [RecentTokens(0.0, of).blocks_to_pack(n, 500, 16) for n in (0, 15, 16, 31, 32)] == [0, 0, 1, 1, 2]


def test_a_tenth_of_thirty_is_three():
    assert 0.1 * 30 > 3 or 0.1 * 3 > 0.3  # what floating point makes of it
    assert RecentTokens(0.1).blocks_to_pack(19, 30, 16) == 1


def test_blocks_and_residual_of_a_cache():
    step = random_step(1, 100)
    cache = stored(NARROW, step, [100])
    assert blocks(cache) == [5]
    assert torch.equal(cache.store.dense().keys, step.keys[:, :, 80:])
    assert cache.store.dense_keys.shape[2] == 32
    # The window grows with the context: 100 more, and 40 of 200 stay.
    cache.append(random_step(1, 100))
    assert blocks(cache) == [10]
    assert cache.store.dense().keys.shape[2] == 40


def test_sinks_do_not_count_as_the_newest():
    cache = stored(NARROW + ",sinks=4", random_step(1, 100), [100])
    assert blocks(cache) == [4]  # 100 - 4 - 20 = 76
    assert cache.store.dense().keys.shape[2] == 4 + 32


def test_the_share_of_the_residual_decays():
    step = random_step(1, 140)
    cache = stored(NARROW + ",recent_of=residual", step.tokens(0, 100), [100])
    held = []
    for token in range(100, 140):
        cache.append(step.tokens(token, token + 1))
        held.append(cache.store.dense().keys.shape[2])
    assert blocks(cache) == [8]
    assert held[0] == 5  # 21 tokens: 5 stay, and 16 are a block
    assert max(held) == 19
    assert torch.equal(cache.store.dense().keys, step.keys[:, :, 128:])


sizes = st.lists(st.integers(1, 70), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(sizes, st.sampled_from([0.0, 0.05, 0.2, 0.4]), st.sampled_from([0, 3]), st.lists(st.integers(0, 90), max_size=2))
def test_the_same_blocks_however_the_tokens_came(counts: list[int], recent: float, sinks: int, pads: list[int]):
    """One append of all tokens, of parts, and of single ones hold the same, for rows that are padded, too."""
    text, length = f"kvmix:recent={recent},residual_length=16,key_group=16,sinks={sinks}", sum(counts)
    step = random_step(len(pads) + 1, length, dim=8)
    starts = torch.tensor([0, *(min(pad, length) for pad in pads)])
    step = Step(step.query, step.keys, step.values, torch.arange(length) >= starts[:, None])
    caches = [stored(text, step, parts) for parts in ([length], counts, [1] * length)]
    for cache in caches:
        assert cache.store.lengths == (length - starts).tolist()
        for row, count in enumerate(cache.store.lengths):
            packed = len(cache.store.tables[row]) * 16
            kept = max(count - sinks, 0) - packed
            assert kept >= min(recent * count, max(count - sinks, 0)) - 1e-6
            assert kept < recent * count + 17
            for mine, one in zip(tokens(cache, row), tokens(caches[0], row), strict=True):
                assert torch.equal(mine, one)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 120), sizes, st.sampled_from(["context", "residual"]), st.data())
def test_attention_over_all_tokens_whatever_happens(first: int, counts: list[int], of: str, data: st.DataObject):
    """Appends, single tokens, crops and selections: pages, residual and their order are those of a plain list."""
    step = random_step(2, first, dim=8)
    cache = layer_cache(MixKVQConfig.parse(f"{EXACT},recent_of={of}"), step)
    held = [(step.keys[row], step.values[row]) for row in range(2)]
    cache.append(step)
    for count in counts:
        for length in (count, 1):
            new = random_step(2, length, dim=8)
            cache.append(new)
            held = [
                (torch.cat([k, new.keys[row]], 1), torch.cat([v, new.values[row]], 1))
                for row, (k, v) in enumerate(held)
            ]
        removed = data.draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
        removed = [min(n, k.shape[1]) for n, (k, _) in zip(removed, held, strict=True)]
        cache.crop(removed)
        held = [(k[:, : k.shape[1] - n], v[:, : v.shape[1] - n]) for n, (k, v) in zip(removed, held, strict=True)]
        rows = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2))
        cache.select(rows)
        held = [held[row] for row in rows]
        for row, expected in enumerate(held):
            for mine, theirs in zip(tokens(cache, row), expected, strict=True):
                assert torch.equal(mine, theirs)
        store = cache.store
        used = max(store._filled(row) for row in range(2))
        assert store.dense_keys.shape[2] <= max(4 / 3 * (used + 15), 16)
        cache.memory()  # checks its parts against the tensors


def test_dense_slots_come_and_go_in_whole_blocks():
    cache = stored(NARROW, random_step(2, 400), [400])
    assert blocks(cache) == [20, 20]
    assert cache.store.dense_keys.shape[2] == 80
    before = cache.memory().parts["residual"]
    cache.crop([330, 330])
    assert cache.store.dense_keys.shape[2] == 16  # the cut runs through a page, of which 6 tokens are left
    assert cache.memory().parts["residual"] == before // 5
    cache.append(random_step(2, 300))
    ragged = torch.arange(100) >= torch.tensor([[90], [0]])
    step = random_step(2, 100)
    cache.append(Step(step.query, step.keys, step.values, ragged))
    wide = cache.store.dense_keys.shape[2]
    cache.select([0, 0])
    assert cache.store.dense_keys.shape[2] <= wide


def test_bits_count_what_is_kept():
    step = random_step(1, 1600, dim=32, dtype=torch.bfloat16)
    cache = stored("kvmix:recent=0.1", step, [1600])
    report = cache.memory()
    assert blocks(cache) == [11]  # 160 stay, 1440 are 11 blocks of 128 and 32 tokens
    assert report.counts_all
    assert report.bits == 3
    held = 11 * 128 * 3 + 2 * 128 * 16  # 192 tokens in a residual of two blocks
    pages = cache.store.pages
    spare = (pages.capacity - pages.used) * pages.record.nbytes * 8 / report.elements
    assert report.size_bits == pytest.approx(held / 1600 + spare, rel=0.01)
    assert not stored("kvmix:recent=0", step, [1600]).memory().counts_all
    assert stored("kvmix", step.tokens(0, 100), [100]).memory().quantized_bits is None  # nothing is packed yet


def backend(cache) -> str:
    return "mixkvq" if isinstance(cache, MixKVQCache) else "eager"


def generated(model, cache, **options) -> torch.Tensor:
    """What is written after three prompts of 90, 73 and 30 tokens, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (3, 90), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(90) >= torch.tensor([0, 17, 60])[:, None]).long()
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, **options}
    with attention(model, backend(cache)):
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


@pytest.mark.parametrize("of", ["context", "residual"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_equals_the_stock_cache(of: str, options: dict):
    model = tiny_model("llama")
    ours = generated(model, MixKVQCache(model.config, f"{EXACT},recent_of={of}"), **options)
    assert torch.equal(ours, generated(model, DynamicCache(config=model.config), **options))


@pytest.mark.parametrize("of", ["context", "residual"])
def test_cropped_and_selected_batches_equal_the_stock_cache(of: str):
    model, logits = tiny_model("llama"), []
    ids = torch.randint(3, VOCABULARY, (3, 120))
    for cache in (MixKVQCache(model.config, f"{EXACT},recent_of={of}"), DynamicCache(config=model.config)):
        with attention(model, backend(cache)), torch.no_grad():
            model(ids, past_key_values=cache)
            cache.crop(-50)
            cache.batch_select_indices(torch.tensor([2, 0]))
            for token in range(20):
                output = model(ids[:2, token : token + 1], past_key_values=cache).logits
        logits.append(output)
    assert torch.allclose(*logits, atol=1e-4)


def test_whose_share_it_is():
    narrow, wide, off = (
        policy_class("kvmix")(MixKVQConfig.parse(text)) for text in ("kvmix", "kvmix:value_bits=4", "kvmix:recent=0")
    )
    assert (narrow.recent, wide.recent, off.recent) == (0.1, 0.2, 0.0)
    assert narrow.rule is None
    assert off.rule is not None
    profile = MixKVQConfig.parse("kvmix-smollm2-135m.json:recent=0")
    assert all(policy_class("kvmix")(profile.for_layer(layer)).recent == 0 for layer in range(30))


def test_what_no_kernel_serves():
    model = tiny_model("llama")
    for text in ("kvmix", "kvmix:recent=0.3,recent_of=residual"):
        assert expected_kernel(MixKVQConfig.parse(text), 8, 128) == "torch"
        assert not fits_fixed(MixKVQConfig.parse(text), torch.device("cpu"))
    assert expected_kernel(MixKVQConfig.parse("kvmix:recent=0"), 8, 128) == "cuda"
    with pytest.raises(ConfigError, match=r"the kvmix policy keeps a share of the context there \(recent=0.1\). Set"):
        MixKVQStaticCache(model.config, "kvmix", max_tokens=512)
    MixKVQStaticCache(model.config, "kvmix:recent=0", max_tokens=512)
    with pytest.raises(ValueError, match=r"keeps a share of the context \(recent=0.2\) out of its pages"):
        stored(NARROW, random_step(1, 20), [20]).tensors()


def test_a_gpu_says_that_torch_reads_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mixkvq.layers.recipe.has_kernels", lambda device: True)
    with pytest.warns(UserWarning, match=r"keeps a share of the context out of its pages \(recent=0.1\)"):
        cache = layer_cache(MixKVQConfig.preset("kvmix"), random_step(1, 20))
    assert not cache.recipe.decodes_on(torch.device("cpu"))
