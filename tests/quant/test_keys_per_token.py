"""Keys that share scales along the channels of a token: what values do, from codes to bytes and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import layer_cache, random_step
from mixkvq import MixKVQConfig
from mixkvq.kernels.decode import decode_attention, kernel_of_format
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers import Step
from mixkvq.quant.block import quantize_keys_per_token, quantize_values


def stored(text: str, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first sequence as they come back from pages."""
    cache = layer_cache(MixKVQConfig.parse(text), step)
    cache.append(step)
    return dequantize_pages(cache.store.packed(), 0, rotated=cache.rotated)


def test_worked_example():
    # Two groups of 4 channels. The first token's: 0 to 6 with a step of 2, -1 to 2 with a step of 1.
    token = torch.tensor([0.0, 1.5, 4.4, 6.0, -1.0, 0.2, 2.0, 1.4])
    keys = torch.stack([token * (i + 1) for i in range(16)])[None, None]
    step = Step(keys, keys, keys)
    restored, _ = stored("kivi-2:key_axis=token,key_group=4,residual_length=16", step)
    assert restored[0, 0].tolist() == [0.0, 2.0, 4.0, 6.0, -1.0, 0.0, 2.0, 1.0]
    assert restored[0, 2].tolist() == [0.0, 6.0, 12.0, 18.0, -3.0, 0.0, 6.0, 3.0]  # a scale of its own


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from((2, 3, 4, 8)),
    groups=st.sampled_from((1, 2, 4)),
    clip=st.booleans(),
    unbiased=st.booleans(),
    rotation=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_codes_are_those_of_values(seed: int, bits: int, groups: int, clip: bool, unbiased: bool, rotation: bool):
    x = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(seed))
    options = {"groups": groups, "clip": clip, "unbiased": unbiased, "rotation": rotation, "param_dtype": torch.float16}
    keys = quantize_keys_per_token(x, torch.full((2, 3, 8), bits, dtype=torch.uint8), bits, **options)
    values = quantize_values(x, bits, **options)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(keys, name), getattr(values, name))


@pytest.mark.parametrize("group", [1024, 64, 24, 5])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_same_keys_and_values_come_back_alike(bits: int, group: int):
    step = random_step(1, 300, dim=48)
    step = Step(step.query, step.keys, step.keys)
    same = f"kivi-2:key_bits={bits},value_bits={bits},key_group={group},value_group={group},key_axis=token"
    keys, values = stored(same, step)
    assert torch.equal(keys, values)


@pytest.mark.parametrize("dim", [16, 48, 80])
def test_bytes_held_are_the_layout_s(dim: int):
    config = MixKVQConfig.parse("kivi-2:key_axis=token,key_bits=3,key_group=32")
    step = random_step(2, 300, dim=dim)
    cache = layer_cache(config, step)
    cache.append(step)
    report, layout = cache.memory(), cache.recipe.layout
    for part, size in layout.part_bytes({}).items():
        assert report.parts[part] == 4 * size  # two pages of each sequence
    groups = -(-dim // 32) if dim != 80 else 4  # 80 is no multiple of 3
    assert report.key_bits == 3 + 32 * groups / dim
    assert report.key_bits_codes == 3


def test_kernels_leave_them_to_torch(monkeypatch: pytest.MonkeyPatch):
    config, step = MixKVQConfig.parse("kivi-2:key_axis=token"), random_step(1, 140)
    monkeypatch.setattr("mixkvq.layers.recipe.has_kernels", lambda device: True)
    monkeypatch.setattr("mixkvq.kernels.decode.has_kernels", lambda device: True)
    with pytest.warns(UserWarning, match=r"No GPU kernel serves this cache, as its keys have scales per token"):
        cache = layer_cache(config, step)
    cache.append(step)
    expected = cache.attend(step.tokens(0, 1), None, scaling=0.25)
    tensors = [getattr(step.tokens(0, 1), name) for name in ("query", "keys", "values")]
    assert torch.allclose(decode_attention(*tensors, cache.tensors(), scaling=0.25), expected, atol=1e-6)
    for kernel in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"The kernel '{kernel}' cannot serve this step: its keys have scales per"):
            decode_attention(*tensors, cache.tensors(), scaling=0.25, kernel=kernel)


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        ("kivi-2", "cuda"),
        ("default:scale_dtype=bfloat16", "triton"),
        ("bf16", "triton"),
        ("kivi-2:key_axis=token", "torch"),
    ],
)
def test_the_kernel_of_a_format(text: str, kernel: str):
    step = random_step(1, 1, dim=128, dtype=torch.bfloat16)
    assert kernel_of_format(layer_cache(MixKVQConfig.parse(text), step).recipe.layout, torch.bfloat16) == kernel
