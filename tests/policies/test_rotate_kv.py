"""RotateKV: a rotation of keys that logits do not notice, and that outliers do not survive."""

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import MixKVQConfig
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers import Step
from mixkvq.quant.rotation import rotate

UNROTATED = "kivi-2:key_axis=token,key_group=128,value_group=128,sinks=20,key_clip=true,value_clip=true"


def stored_keys(text: str, step: Step) -> torch.Tensor:
    """Keys of the first sequence's pages."""
    cache = layer_cache(MixKVQConfig.parse(text), step)
    cache.append(step)
    return dequantize_pages(cache.store.packed(), 0, rotated=cache.rotated)[0]


def test_a_rotated_vector_by_hand():
    # H (8, 0, 0, 0) = (4, 4, 4, 4): a constant group, which a page holds exactly. Unrotated, too, with a step of 8 / 3.
    keys = torch.zeros(1, 1, 16, 4)
    keys[..., 0] = 8.0
    keys[:, :, :, 1] = 1.0
    step = Step(keys, keys, keys)
    # H (8, 1, 0, 0) = (4.5, 3.5, 4.5, 3.5): two levels, again exact; unrotated the 1 becomes 0
    fields = "sinks=0,residual_length=16,key_group=4"
    rotated = f"rotatekv-2:{fields},key_clip=false,key_rope=after"
    assert torch.allclose(stored_keys(rotated, step), keys[0], atol=2e-3)
    unrotated = stored_keys(f"kivi-2:key_axis=token,{fields}", step)[0, 0]
    assert torch.allclose(unrotated, torch.tensor([8.0, 0.0, 0.0, 0.0]), atol=1e-2)


@pytest.mark.parametrize("dim", [16, 24, 64, 80])
def test_attention_is_exact_where_the_codes_are(dim: int):
    """Keys and values whose rotations are whole numbers from 0 to 255 lose nothing in 8 bits."""
    past, step = random_step(2, 300, dim=dim), random_step(2, 3, dim=dim)
    whole = torch.randint(0, 256, past.keys.shape).float()
    whole[..., 0], whole[..., 1] = 0, 255
    past = Step(past.query, rotate(whole) / 64, rotate(whole.flip(2)) / 64)
    outputs = []
    for text in ("bf16:sinks=20", "rotatekv-4:key_bits=8,value_bits=8,key_rope=after"):
        cache = layer_cache(MixKVQConfig.parse(text), past)
        cache.append(past)
        outputs.append(cache.attend(step, None, scaling=dim**-0.5))
    assert torch.allclose(*outputs, atol=1e-3)


def test_full_precision_keys_are_not_rotated():
    step = random_step(1, 300)
    assert torch.equal(stored_keys("rotatekv-4:key_bits=16", step), step.keys[0, :, 20 : 20 + 256])


def test_outliers_of_a_few_channels_are_spread():
    step = random_step(1, 300, dim=64)
    keys = torch.randn_like(step.keys)
    keys[..., 5] += 30
    step = Step(step.query, keys, step.values)
    errors = [
        (stored_keys(text, step) - keys[0, :, 20 : 20 + 256]).square().mean()
        for text in ("rotatekv-2:key_rope=after", UNROTATED)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_bits_are_those_of_values():
    step = random_step(1, 300, dim=128)
    cache = layer_cache(MixKVQConfig.parse("rotatekv-2"), step)
    cache.append(step)
    report = cache.memory()
    assert report.key_bits == report.value_bits == 2 + 32 / 128
    assert report.parts["sinks"] == 2 * 2 * 20 * 128 * 4  # keys and values, 2 heads, 20 tokens, float32


def test_a_cut_through_a_page_gives_keys_back_unrotated():
    step = random_step(1, 300)
    cache = layer_cache(MixKVQConfig.parse("rotatekv-4:key_bits=8,value_bits=8"), step)
    cache.append(step)
    cache.crop([160])
    restored = cache.store.dense_keys[0, :, 20:140]
    assert (restored - step.keys[0, :, 20:140]).abs().max() < 0.1
