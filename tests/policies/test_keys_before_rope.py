"""Keys that are quantized before RoPE: what pages hold, and what comes back."""

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import ConfigError, MixKVQConfig
from mixkvq.kernels.decode import decode_attention, kernel_of_format
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers import LayerCache, Step
from mixkvq.policies import policy_class
from mixkvq.quant.rope import Rope

SMALL = "kvquant-2:key_rope=before,outliers=0,sinks=3,residual_length=16,key_group=16,scale_dtype=float32"
#: The newest tokens stay out of the pages.
RECENT = SMALL.replace("kvquant-2", "kvmix") + ",recent=0.3"


def turned(keys: torch.Tensor, numbers: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
    """RoPE of ``keys [..., T, D]`` at tokens ``numbers [T]`` as complex numbers, of the fixtures' frequencies."""
    half = keys.shape[-1] // 2
    angle = sign * numbers[:, None] * 10000.0 ** (-torch.arange(half) / half)
    pairs = torch.complex(keys[..., :half], keys[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], -1)


def filled(text: str, step: Step) -> LayerCache:
    cache = layer_cache(MixKVQConfig.parse(text), step)
    cache.append(step)
    return cache


def stored_keys(cache: LayerCache, row: int = 0) -> torch.Tensor:
    return dequantize_pages(cache.store.packed(), row, rotated=cache.rotated)[0]


@pytest.mark.parametrize("text", [SMALL, SMALL + ",key_axis=token,key_group=128", RECENT])
def test_keys_that_do_not_change_before_rope_come_back(text: str):
    step = random_step(1, 100)
    constant = torch.randn(1, 2, 1, 16) if "token" not in text else torch.full((1, 2, 1, 16), 1.5)
    keys = turned(constant.expand(1, 2, 100, 16), torch.arange(100))
    cache = filled(text, Step(step.query, keys, step.values))
    after = filled(text + ",key_rope=after", Step(step.query, keys, step.values))
    packed = keys[0, :, 3 : 3 + 16 * len(cache.store.tables[0])]
    assert torch.allclose(stored_keys(cache), packed, atol=1e-5)
    assert (stored_keys(after) - packed).abs().max() > 0.1


def test_the_codes_are_those_of_keys_without_rope():
    step = random_step(1, 40)
    plain = turned(step.keys[0], torch.arange(40), -1.0)[:, 3:35].unflatten(1, (2, 16))
    low, high = plain.amin(2, keepdim=True), plain.amax(2, keepdim=True)
    step_size = (high - low) / 3
    restored = ((plain - low) / step_size).round() * step_size + low
    expected = turned(restored.flatten(1, 2), torch.arange(3, 35))
    assert torch.allclose(stored_keys(filled(SMALL, step)), expected, atol=1e-4)


def test_padding_appends_and_selected_rows_leave_numbers_as_they_are():
    """A token's angle follows from its number in its sequence, however it came."""
    step, pad = random_step(2, 100), 7
    real = torch.arange(100) >= torch.tensor([0, pad])[:, None]
    cache = filled(SMALL, Step(step.query, step.keys, step.values, real))
    alone = Step(step.query[1:, :, pad:], step.keys[1:, :, pad:], step.values[1:, :, pad:])
    piecemeal = layer_cache(MixKVQConfig.parse(SMALL), alone)
    for start, stop in ((0, 2), (2, 30), *((i, i + 1) for i in range(30, 93))):
        piecemeal.append(alone.tokens(start, stop))
    assert torch.allclose(stored_keys(cache, 1), stored_keys(piecemeal), atol=1e-5)
    cache.select([1, 0, 1])
    assert torch.allclose(stored_keys(cache, 2), stored_keys(piecemeal), atol=1e-5)


def test_a_cut_through_a_page_gives_back_keys_with_rope():
    step = random_step(1, 100)
    cache = filled(SMALL.replace("kvquant-2", "kvquant-4") + ",key_bits=8", step)
    before = stored_keys(cache)
    cache.crop([100 - 3 - 4 * 16 - 5])
    assert torch.allclose(cache.store.dense_keys[0, :, 3:8], before[:, 64:69], atol=1e-6)
    cache.append(step.tokens(72, 83))  # the block is full again, five of its keys quantized twice
    assert torch.allclose(stored_keys(cache)[:, 64:], before[:, 64:80], atol=0.1)


def test_full_precision_keys_stay_as_they_are():
    step = random_step(1, 100)
    assert torch.equal(stored_keys(filled(SMALL + ",key_bits=16", step)), step.keys[0, :, 3:99])


@pytest.mark.parametrize("text", ["rotatekv-4:residual_length=32", "kvquant-4:residual_length=32,key_group=32"])
def test_a_layer_without_rope_is_stored_as_it_is(text: str):
    config, step = MixKVQConfig.parse(text), random_step(1, 100)
    cache = LayerCache(config, policy_class(config.policy)(config), step, Rope())
    cache.append(step)
    assert torch.equal(stored_keys(cache), stored_keys(filled(text + ",key_rope=after", step)))


def test_bits_are_the_same():
    step = random_step(1, 300, dim=64)
    before, after = (filled(f"kvquant-2:key_rope={rope}", step).memory() for rope in ("before", "after"))
    assert before.parts == after.parts


def test_kernels_leave_them_to_torch():
    config, step = MixKVQConfig.parse("kivi-2:key_rope=before"), random_step(1, 140)
    cache = filled("kivi-2:key_rope=before", step)
    assert kernel_of_format(layer_cache(config, step).recipe.layout, torch.bfloat16) == "torch"
    tensors = [getattr(step.tokens(0, 1), name) for name in ("query", "keys", "values")]
    with pytest.raises(ValueError, match=r"cannot serve this step: its keys are quantized before RoPE \(key_rope="):
        decode_attention(*tensors, cache.tensors(), scaling=0.25, kernel="triton")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kivi-2:key_rope=never", "key_rope is one of after, before"),
        (
            "default:key_rope=before",
            "mixkvq policy looks at queries, which have RoPE: set key_rope to 'after', or",
        ),
        ("quality:key_rope=before", "key_feedback looks at queries, which have RoPE: .* or key_feedback to none"),
        ("pm-kvq-2:key_rope=before", "pm-kvq policy stores keys as they come before it makes codes: leave key_rope"),
        ("conf-kv:key_rope=before", "The conf-kv policy has no key_rope: leave it out"),
    ],
)
def test_what_does_not_go_together(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        MixKVQConfig.parse(text)


def test_a_layer_whose_rope_is_not_given():
    config, step = MixKVQConfig.preset("kvquant-2"), random_step(1, 10)
    with pytest.raises(ConfigError, match=r"needs the layer's RoPE, which is not known here: set key_rope to 'after'"):
        LayerCache(config, policy_class(config.policy)(config), step)


def test_files_from_before_the_field_keep_what_they_were_made_for():
    fields = MixKVQConfig.preset("kvquant-2").as_dict()
    del fields["key_rope"]
    assert MixKVQConfig.from_dict(fields).key_rope == "after"
