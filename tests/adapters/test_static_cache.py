"""The cache of a fixed size in transformers: the same tokens as the growing one, compiled or not, and clear limits."""

import gc
import warnings
import weakref

import pytest
import torch
import torch._dynamo
import transformers as tf
from transformers import CompileConfig, PreTrainedModel, StaticCache

from mixkvq import CacheFullError, ConfigError, MixKVQCache, MixKVQConfig, MixKVQStaticCache, UnsupportedModelError
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.models import attention
from mixkvq.policies.kivi import KIVI
from mixkvq.store.view import PackedPages
from models import ARCHITECTURES, SIZE, VOCABULARY, tiny_model

GREEDY = {"do_sample": False, "eos_token_id": None}
PADS = (0, 41)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def ids(batch: int = 1, length: int = 20) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def left_padded(length: int) -> dict[str, torch.Tensor]:
    mask = (torch.arange(length) >= torch.tensor(PADS)[:, None]).long()
    return {"input_ids": ids(len(PADS), length) * mask, "attention_mask": mask}


def generated(model: PreTrainedModel, cache, inputs: dict, new: int = 40, **options) -> torch.Tensor:
    with attention(model, "mixkvq"):
        return model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **GREEDY, **options)


def assert_same_content(static: MixKVQStaticCache, growing: MixKVQCache) -> None:
    store = static.state.cache.store
    for layer, other in enumerate(growing.quantized_layers):
        ours, theirs = store.tensors(layer), other.cache.tensors()
        assert torch.equal(ours.lengths, theirs.lengths)
        for row, blocks in enumerate(ours.places()[0].tolist()):
            if blocks:
                a = dequantize_pages(PackedPages.of_cache(ours), row, rotated=ours.rotated)
                b = dequantize_pages(PackedPages.of_cache(theirs), row, rotated=theirs.rotated)
                for one, two in zip(a, b, strict=True):
                    # Blocks come in batches of other sizes: sums may differ in their last bit, and a rounding tie of
                    # a scale or a code may fall to the other side.
                    assert ((one - two).abs() > 1e-2).float().mean() < 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [60, 200])
def test_every_architecture_gives_the_tokens_of_the_growing_cache(architecture: str, length: int):
    model, inputs = tiny_model(architecture), left_padded(length)
    growing = MixKVQCache(model.config, "default:residual_length=64,key_group=64")
    static = MixKVQStaticCache(model.config, "default:residual_length=64,key_group=64", max_tokens=1024)
    expected = generated(model, growing, inputs, new=80)
    assert torch.equal(generated(model, static, inputs, new=80), expected)
    assert_same_content(static, growing)
    report, other = static.memory(), growing.memory()
    assert report.packed_keys == other.packed_keys > 0
    assert report.bits == other.bits
    assert static.get_seq_length(static.layers.index(static.quantized_layers[0])) == length + 79


@pytest.mark.parametrize("preset", ["kivi-2", "kitty", "bf16", "paper:tau_uint4=0.5,tau_bf16=1.2"])
def test_presets(model: PreTrainedModel, preset: str):
    inputs = left_padded(300)
    growing = MixKVQCache(model.config, preset)
    static = MixKVQStaticCache(model.config, preset, max_tokens=2048, promoted_share=1.0)
    assert torch.equal(generated(model, static, inputs), generated(model, growing, inputs))
    assert_same_content(static, growing)


def test_several_turns(model: PreTrainedModel):
    turns = [ids(2, length) for length in (70, 1, 33, 8, 200, 5, 2)]
    masks = [torch.ones_like(turn) for turn in turns]
    masks[0][1, :20] = 0
    masks[3][1, :3] = 0
    masks[4][0, :150] = 0
    growing, static = MixKVQCache(model.config), MixKVQStaticCache(model.config, max_tokens=1024)
    seen = torch.zeros(2, 0, dtype=torch.long)
    for turn, mask in zip(turns, masks, strict=True):
        seen = torch.cat([seen, mask], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -turn.shape[1] :]
        arguments = {"attention_mask": seen, "position_ids": positions}
        with torch.inference_mode(), attention(model, "mixkvq"):
            expected = model(turn, past_key_values=growing, **arguments).logits
            logits = model(turn, past_key_values=static, **arguments).logits
        assert torch.allclose(logits[mask.bool()], expected[mask.bool()], atol=1e-4)
        assert static.get_seq_length() == seen.shape[1]
    assert_same_content(static, growing)


def test_multi_turn_through_generate(model: PreTrainedModel):
    text, growing = ids(2, 90), MixKVQCache(model.config)
    static = MixKVQStaticCache(model.config, max_tokens=1024)
    for _ in range(3):
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        expected = generated(model, growing, inputs, new=20)
        assert torch.equal(generated(model, static, inputs, new=20), expected)
        text = torch.cat([expected, ids(2, 25)], 1)


@pytest.mark.parametrize("options", [{"do_sample": True, "num_return_sequences": 3}, {"prefill_chunk_size": 50}])
def test_what_else_generate_can_do(model: PreTrainedModel, options: dict):
    text = ids(1, 130)
    outputs = []
    for cache in (MixKVQCache(model.config), MixKVQStaticCache(model.config, max_tokens=1024)):
        torch.manual_seed(1)
        with attention(model, "mixkvq"):
            options = {**GREEDY, "max_new_tokens": 30, **options}
            outputs.append(model.generate(text, past_key_values=cache, **options))
    assert torch.equal(*outputs)


def test_reset_and_the_next_batch(model: PreTrainedModel):
    hybrid = tiny_model("gemma3")
    for each in (model, hybrid):
        static = MixKVQStaticCache(each.config, max_tokens=1024)
        held = None
        for batch in (2, 2, 3, 2):
            inputs = {"input_ids": ids(batch, 140), "attention_mask": torch.ones(batch, 140, dtype=torch.long)}
            expected = generated(each, MixKVQCache(each.config), inputs)
            assert torch.equal(generated(each, static, inputs), expected)
            addresses = (static.state.cache.store.pages.data_ptr(), static.state.anchor.data_ptr())
            if batch == 2 and held is not None and held[0] == 2:
                assert held[1] == addresses
            assert held is None or batch == held[0] or addresses[1] != held[1][1]
            held = batch, addresses
            static.reset()
            assert static.get_seq_length() == 0
            assert static.memory().elements == 0


# Compiled


def compiled(backend: str, **options) -> dict:
    config = CompileConfig(backend=backend, mode=None, **options)
    config._compile_all_devices = True
    return {"compile_config": config}


@pytest.fixture
def counters():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_generate_compiles_once_for_all_caches(architecture: str, counters):
    model = tiny_model(architecture)
    for _ in range(3):
        inputs = left_padded(100)
        expected = generated(model, MixKVQCache(model.config), inputs, new=60)
        static = MixKVQStaticCache(model.config, max_tokens=1024)
        tokens = generated(model, static, inputs, new=60, **compiled("aot_eager", fullgraph=True))
        assert torch.equal(tokens, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
def test_inductor_and_sliding_layers(architecture: str, counters):
    model, inputs = tiny_model(architecture), left_padded(100)
    expected = generated(model, MixKVQCache(model.config), inputs, new=60)
    static = MixKVQStaticCache(model.config, max_tokens=1024)
    assert torch.equal(generated(model, static, inputs, new=60, **compiled("inductor", fullgraph=True)), expected)
    # The library's sliding layers compile twice, as in its own StaticCache.
    assert counters["stats"]["unique_graphs"] == (1 if architecture == "llama" else 2)


@pytest.mark.slow
def test_prompts_in_chunks_compile_too(model: PreTrainedModel, counters):
    inputs = left_padded(200)
    expected = generated(model, MixKVQCache(model.config), inputs, prefill_chunk_size=64)
    static = MixKVQStaticCache(model.config, max_tokens=1024)
    options = {"prefill_chunk_size": 64, **compiled("aot_eager")}
    assert torch.equal(generated(model, static, inputs, **options), expected)


def test_a_model_that_was_compiled_by_hand(model: PreTrainedModel, counters):
    """Without masks from outside, the model makes them inside the compiled region."""
    step = torch.compile(model.__call__, backend="aot_eager", fullgraph=True)
    growing, static = MixKVQCache(model.config), MixKVQStaticCache(model.config, max_tokens=1024)
    text = ids(2, 120)
    with torch.no_grad(), attention(model, "mixkvq"):
        for cache in (growing, static):
            model(text, past_key_values=cache)
        for _ in range(20):
            token = ids(2, 1)
            expected = model(token, past_key_values=growing).logits
            assert torch.allclose(step(token, past_key_values=static).logits, expected, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert static.memory().packed_keys > 0


def test_a_cache_is_freed_and_its_anchor_is_not(model: PreTrainedModel):
    static = MixKVQStaticCache(model.config, max_tokens=1024)
    generated(model, static, left_padded(50))
    pages, anchor = weakref.ref(static.state.cache.store), static.state.anchor
    del static
    gc.collect()
    assert pages() is None
    one = torch.randn(2, 4, 1, 16)
    with pytest.raises(RuntimeError, match="does not exist any more"):
        torch.ops.mixkvq.attend(one, one, one, anchor, 0, 1.0, None, None)


def test_masks_of_the_librarys_own_static_cache_stay(model: PreTrainedModel):
    inputs = left_padded(100)
    with attention(model, "eager"):
        expected = model.generate(**inputs, max_new_tokens=20, **GREEDY)
    cache = StaticCache(config=model.config, max_cache_len=200)
    assert torch.equal(generated(model, cache, inputs, new=20), expected)


# Limits


def test_a_prompt_that_does_not_fit(model: PreTrainedModel):
    static = MixKVQStaticCache(model.config, max_tokens=512)
    with torch.inference_mode(), attention(model, "mixkvq"):
        model(ids(2, 300), past_key_values=static)
        with pytest.raises(CacheFullError, match=r"with the 600 new tokens, 1,024 tokens .* 512 tokens for all"):
            model(ids(2, 300), past_key_values=static)
        assert static.get_seq_length() == 300
        model(ids(2, 40), past_key_values=static)
        assert static.get_seq_length() == 340


@pytest.mark.parametrize("compile_it", [False, True])
def test_generation_until_the_cache_is_full(model: PreTrainedModel, compile_it: bool, counters):
    inputs = left_padded(200)
    static = MixKVQStaticCache(model.config, "default", max_tokens=512)
    options = compiled("aot_eager") if compile_it else {}
    with pytest.raises(CacheFullError, match=r"has room for (\d+) positions of each sequence, and this would be"):
        generated(model, static, inputs, new=1000, **options)
    # 4 pages: the first sequence gets its second after 260 tokens, the other one its second 41 later.
    assert static.get_seq_length() == static.get_mask_sizes(1, 0)[0] == static.get_max_length() == 4 + 3 * 128 - 1
    assert static.memory().elements == 2 * 2 * 16 * 2 * (387 + 387 - 41)


def test_steps_without_a_mask_are_counted(model: PreTrainedModel):
    static = MixKVQStaticCache(model.config, "kivi-2", max_tokens=128)
    with torch.inference_mode(), attention(model, "mixkvq"):
        model(ids(1, 250), past_key_values=static)
        for _ in range(5):
            model(ids(1, 1), past_key_values=static)
        with pytest.raises(CacheFullError, match="room for 0 more tokens of each sequence, and 1 came"):
            model(ids(1, 1), past_key_values=static)


def test_what_needs_rows_to_move(model: PreTrainedModel):
    static = MixKVQStaticCache(model.config, max_tokens=1024)
    generated(model, static, left_padded(50))
    rows = torch.tensor([1, 0])
    for use in (
        lambda: static.reorder_cache(rows),
        lambda: static.batch_select_indices(rows),
        lambda: static.batch_repeat_interleave(2),
        lambda: static.crop(-1),
    ):
        with pytest.raises(NotImplementedError, match="Use MixKVQCache"):
            use()
    with pytest.raises(NotImplementedError, match="no beams"):
        generated(model, MixKVQStaticCache(model.config, max_tokens=1024), left_padded(50), num_beams=2)


def test_trees_of_drafts(model: PreTrainedModel):
    static = MixKVQStaticCache(model.config, max_tokens=1024)
    with torch.inference_mode(), attention(model, "mixkvq"):
        model(ids(1, 20), past_key_values=static)
        mask = torch.ones(1, 1, 3, 23, dtype=torch.bool)
        mask[..., 20:] = torch.eye(3, dtype=torch.bool)
        with pytest.raises(UnsupportedModelError, match="2 to 8 tokens on a MixKVQStaticCache is causal"):
            model(ids(1, 3), past_key_values=static, attention_mask=mask)


def test_another_batch_size(model: PreTrainedModel):
    static = MixKVQStaticCache(model.config, max_tokens=1024)
    with torch.inference_mode(), attention(model, "mixkvq"):
        model(ids(2), past_key_values=static)
        for length in (1, 20):
            with pytest.raises(ValueError, match="holds a batch of 2 and was given one of 3"):
                model(ids(3, length), past_key_values=static)


class Own(KIVI):
    """A policy that only torch can carry out."""

    def plan(self, block):
        return super().plan(block)


def test_what_cannot_be_built(model: PreTrainedModel):
    config = MixKVQConfig.preset("kivi-2")
    with pytest.raises(ConfigError, match=r"Own has none\. Give it a rule, or use MixKVQCache"):
        MixKVQStaticCache(model.config, config, max_tokens=100, policy=Own(config))
    with pytest.raises(ValueError, match="either max_tokens or max_bytes"):
        MixKVQStaticCache(model.config)
    with pytest.raises(TypeError, match="MixKVQStaticCache takes the model's configuration"):
        MixKVQStaticCache(model, max_tokens=100)
    with pytest.raises(TypeError, match=r"MixKVQStaticCache takes a MixKVQConfig second, .* not int"):
        MixKVQStaticCache(model.config, 65536)
    with pytest.raises(UnsupportedModelError, match="nothing to quantize"):
        MixKVQStaticCache(tf.MistralConfig(**SIZE, sliding_window=32), max_tokens=100)
    with pytest.raises(UnsupportedModelError, match="multi-head latent attention"):
        MixKVQStaticCache(tf.DeepseekV3Config(), max_tokens=100)


def test_layers_of_different_shapes(model: PreTrainedModel):
    state = MixKVQStaticCache(model.config, max_tokens=1024).state
    state.expected.heads = set()
    state.arrive(0, *[torch.zeros(1, 2, 5, 16)] * 2)
    with pytest.raises(UnsupportedModelError, match=r"layers of this model differ .* Use MixKVQCache"):
        state.arrive(1, *[torch.zeros(1, 4, 5, 16)] * 2)


def test_max_bytes_and_parts(model: PreTrainedModel):
    static = MixKVQStaticCache(model.config, max_bytes=400_000)
    generated(model, static, left_padded(150))
    report = static.memory()
    assert 390_000 < report.total - static.state.positions.nbytes - static.state.anchor.nbytes <= 400_000
    assert report.parts["spare"] > 0
    assert report.parts["statistics"] > 0


def test_debug_names_what_is_not_finite(model: PreTrainedModel):
    static = MixKVQStaticCache(model.config, "default:debug=true", max_tokens=1024)
    key = torch.zeros(1, 2, 1, 16)
    static.state.arrive(0, key, key)
    with pytest.raises(FloatingPointError, match="NaN or infinity in its values"):
        torch.ops.mixkvq.attend(torch.zeros(1, 4, 1, 16), key, key / 0, static.state.anchor, 0, 1.0, None, None)


def test_thresholds_warn_when_room_was_short(model: PreTrainedModel):
    static = MixKVQStaticCache(model.config, "paper:tau_uint4=0.1,tau_bf16=9", max_tokens=1024, promoted_share=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generated(model, static, left_padded(300))
    with pytest.warns(UserWarning, match=r"promoted_share .* or a budget instead of thresholds"):
        static.memory()
