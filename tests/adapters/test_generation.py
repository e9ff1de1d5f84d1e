"""What ``generate`` can do, and the operations on the batch, against the stock cache."""

import pytest
import torch
from transformers import DynamicCache

from mixkvq import MixKVQCache
from mixkvq.models import attention
from models import VOCABULARY, tiny_model

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture
def model():
    return tiny_model("llama")


def run(model, ids, cache, **options):
    with attention(model, "eager" if isinstance(cache, DynamicCache) else "mixkvq"):
        return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)


def prompt(batch: int = 1, length: int = 150) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


@pytest.mark.parametrize(
    "options",
    [
        {**GREEDY},
        {"do_sample": True, "top_k": 20, "eos_token_id": None},
        {**GREEDY, "num_beams": 3},
        {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2, "eos_token_id": None},
        {"do_sample": True, "num_return_sequences": 3, "eos_token_id": None},
        {**GREEDY, "prompt_lookup_num_tokens": 6},
        {**GREEDY, "prefill_chunk_size": 40},
        {**GREEDY, "repetition_penalty": 1.2},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("batch", [1, 2])
def test_generate_equals_the_stock_cache(model, options: dict, batch: int):
    if "prompt_lookup_num_tokens" in options and batch > 1:
        pytest.skip("transformers drafts for one sequence only")
    ids = prompt(batch)
    if "prompt_lookup_num_tokens" in options:
        ids = ids[:, :30].repeat(1, 5)  # something to look up
    torch.manual_seed(3)
    expected = run(model, ids, DynamicCache(config=model.config), max_new_tokens=80, **options)
    torch.manual_seed(3)
    cache = MixKVQCache(model.config, "bf16:residual_length=32,sinks=3")
    assert torch.equal(run(model, ids, cache, max_new_tokens=80, **options), expected)


@pytest.mark.parametrize("preset", ["default", "kivi-2", "paper:tau_uint4=0.5,tau_bf16=1.2"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 5}, {"num_return_sequences": 1}])
def test_quantized_caches_serve_the_same_calls(model, preset: str, options: dict):
    cache = MixKVQCache(model.config, f"{preset}{',' if ':' in preset else ':'}residual_length=128")
    out = run(model, prompt(length=300), cache, max_new_tokens=150, **GREEDY, **options)
    assert out.shape == (1, 450)
    assert cache.memory().packed_keys > 0


def test_drafts_are_taken_back_exactly(model):
    """What assisted decoding crops never reached a page, nor the query statistics."""
    step = prompt(length=140)
    config = "default:residual_length=32,key_group=32"
    drafted, plain = MixKVQCache(model.config, config), MixKVQCache(model.config, config)
    with torch.inference_mode(), attention(model, "mixkvq"):
        for cache in (drafted, plain):
            model(step[:, :95], past_key_values=cache)
        drafted.activate_past_recording()
        model(torch.cat([step[:, 95:101], prompt(length=9)], 1), past_key_values=drafted)  # 9 wrong ones
        drafted.crop(-9)
        model(step[:, 95:101], past_key_values=plain)
        assert drafted.get_seq_length() == plain.get_seq_length() == 101
        for start in range(101, 140):
            a = model(step[:, start : start + 1], past_key_values=drafted).logits
            b = model(step[:, start : start + 1], past_key_values=plain).logits
            assert torch.allclose(a, b, atol=1e-5)
    assert plain.memory().packed_keys == drafted.memory().packed_keys > 0


def test_a_long_prompt_does_not_wait_unpacked(model):
    cache = MixKVQCache(model.config, "default")
    cache.activate_past_recording()
    with torch.inference_mode(), attention(model, "mixkvq"):
        model(prompt(length=1000), past_key_values=cache)
    held = cache.layers[0].held
    assert held.length == 128
    assert held.keys.untyped_storage().nbytes() == held.keys.nbytes  # not a view of the whole prompt
    assert cache.memory().elements == 2 * 1000 * 2 * 32
    cache.crop(-100)
    cache.crop(-400)
    assert cache.get_seq_length() == 500


@pytest.mark.parametrize("preset", ["bf16:residual_length=32", "default"])
def test_turns_on_one_cache(model, preset: str):
    turns = [prompt(2, length) for length in (70, 1, 33, 200, 5)]
    masks = [torch.ones_like(turn) for turn in turns]
    masks[0][1, :20] = 0
    masks[3][0, :150] = 0  # padding in the middle of a conversation
    cache, stock = MixKVQCache(model.config, preset), DynamicCache(config=model.config)
    seen = torch.zeros(2, 0, dtype=torch.long)
    for turn, mask in zip(turns, masks, strict=True):
        seen = torch.cat([seen, mask], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -turn.shape[1] :]
        arguments = {"attention_mask": seen, "position_ids": positions}
        with torch.inference_mode():
            with attention(model, "eager"):
                expected = model(turn, past_key_values=stock, **arguments).logits
            with attention(model, "mixkvq"):
                logits = model(turn, past_key_values=cache, **arguments).logits
        assert cache.get_seq_length() == seen.shape[1]
        real = mask.bool()
        if preset.startswith("bf16"):
            assert torch.allclose(logits[real], expected[real], atol=1e-4)
        assert logits[real].isfinite().all()
    assert cache.layers[0].cache.store.lengths == seen.sum(1).tolist()


def test_multi_turn_through_generate(model):
    ids = prompt(length=90)
    cache, stock = MixKVQCache(model.config, "bf16:residual_length=32"), DynamicCache(config=model.config)
    for _ in range(3):
        expected = run(model, ids, stock, max_new_tokens=20, **GREEDY)
        got = run(model, ids, cache, max_new_tokens=20, **GREEDY)
        assert torch.equal(got, expected)
        ids = torch.cat([got, prompt(length=25)], 1)


def logits_after(model, cache, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), attention(model, "mixkvq"):
        return model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("preset", ["default", "paper:tau_uint4=0.5,tau_bf16=1.2", "kitty-pro"])
def test_operations_on_the_batch(model, preset: str):
    ids = prompt(3, 330)
    cache, other = MixKVQCache(model.config, preset), MixKVQCache(model.config, preset)
    for each in (cache, other):
        logits_after(model, each, ids)
    next_token = prompt(3, 1)
    expected = logits_after(model, other, next_token)

    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    assert torch.allclose(logits_after(model, cache, next_token[order]), expected[order], atol=1e-5)
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    twice = order.repeat_interleave(2)
    assert torch.allclose(logits_after(model, cache, next_token[twice]), expected[twice], atol=1e-5)
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([5, 0]))
    chosen = twice[[5, 0]]
    assert torch.allclose(logits_after(model, cache, next_token[chosen]), expected[chosen], atol=1e-5)
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([True, False]))
    assert torch.allclose(logits_after(model, cache, next_token[chosen[:1]]), expected[chosen[:1]], atol=1e-5)


def test_reset_starts_anew_with_another_batch(model):
    cache = MixKVQCache(model.config, "default")
    logits_after(model, cache, prompt(2, 300))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory().total == 0
    ids = prompt(3, 200)
    expected = logits_after(model, MixKVQCache(model.config, "default"), ids)
    assert torch.equal(logits_after(model, cache, ids), expected)


def test_operations_before_the_first_token_do_nothing(model):
    cache = MixKVQCache(model.config, "default")
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.crop(-3)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory().bits == 0


@pytest.mark.parametrize("length", [1, 2, 127])
def test_sequences_shorter_than_a_block(model, length: int):
    ids = prompt(2, length)
    expected = run(model, ids, DynamicCache(config=model.config), max_new_tokens=5, **GREEDY)
    cache = MixKVQCache(model.config, "kivi-2:residual_length=256")
    assert torch.equal(run(model, ids, cache, max_new_tokens=5, **GREEDY), expected)
    assert cache.memory().packed_keys == 0


def test_sixteen_bit_models(model):
    ids = prompt(2, 300)
    for dtype in (torch.bfloat16, torch.float16):
        half = tiny_model("llama")
        try:
            half.to(dtype)
            cache = MixKVQCache(half.config, "default")
            out = run(half, ids, cache, max_new_tokens=10, **GREEDY)
            assert out.shape == (2, 310)
            assert cache.layers[0].cache.store.dense_keys.dtype == dtype
        finally:
            half.to(torch.float32)
