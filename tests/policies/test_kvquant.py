"""KVQuant: outliers and levels, from blocks to bytes and back."""

import pytest
import torch

from conftest import layer_cache, random_step
from mixkvq import ConfigError, MixKVQConfig
from mixkvq.kernels.reference import dequantize_pages
from mixkvq.layers import LayerCache, Step


def filled(config: MixKVQConfig, step: Step) -> LayerCache:
    cache = layer_cache(config, step)
    cache.append(step)
    return cache


def stored(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first sequence's pages."""
    return dequantize_pages(cache.store.packed(), 0, rotated=cache.rotated)


def test_outliers_come_back_exactly_and_spare_the_others():
    step = random_step(1, 129, dim=64)
    keys, values = torch.randn(1, 2, 129, 64), torch.randn(1, 2, 129, 64)
    keys[0, 0, 17, 3], values[0, 1, 40, 9] = 5000.0, -3000.0
    step = Step(step.query, keys, values)
    cache = filled(MixKVQConfig.preset("kvquant-4", key_rope="after"), step)
    k, v = stored(cache)
    assert k[0, 16, 3] == torch.tensor(5000.0).bfloat16()  # after the sink
    assert v[1, 39, 9] == torch.tensor(-3000.0).bfloat16()
    assert (k[0, :, 3] - keys[0, 0, 1:, 3])[torch.arange(128) != 16].abs().max() < 0.3
    assert (v[1, 39] - values[0, 1, 40])[torch.arange(64) != 9].abs().max() < 0.3


@pytest.mark.parametrize(("dim", "place"), [(64, 2), (320, 4)])
def test_what_outliers_cost(dim: int, place: int):
    """1% of a page and head, 16 bits each and a place, which takes 32 bits where a page has more than 2^15 numbers."""
    cache = filled(MixKVQConfig.preset("kvquant-2"), random_step(1, 300, dim=dim))
    count = round(0.01 * 128 * dim)
    report, pages = cache.memory(), 2
    for kind in ("key", "value"):
        aligned = sum(-(-2 * count * size // 16) * 16 for size in (2, place))
        assert report.parts[f"{kind} outliers"] == pages * aligned
    honest = sum(report.parts[f"key {part}"] for part in ("codes", "scales", "outliers"))
    assert report.key_bits == 8 * honest / (pages * 2 * 128 * dim)
    assert report.bits == pytest.approx((report.key_bits + report.value_bits) / 2)


def test_levels_are_what_codes_stand_for():
    # A channel that takes the values 0, 1, 5 and 6: levels in steps of 2.
    x = torch.tensor([0.0, 1.0, 5.0, 6.0]).repeat(4)
    keys = x[None, None, :, None].expand(1, 1, 16, 4).contiguous()
    values = x[:4].expand(1, 1, 16, 4).contiguous()
    levels = (0.0, 0.5, 2.5, 3.0)
    config = MixKVQConfig.parse("kivi-2:residual_length=16,key_group=16").replace(
        key_levels=levels, value_levels=levels
    )
    k, v = stored(filled(config, Step(keys, keys, values)))
    assert torch.equal(k, keys[0])
    assert torch.equal(v, values[0])


@pytest.mark.parametrize(
    "config",
    [
        MixKVQConfig.preset("kvquant-2", key_levels=(0.1, 1, 2, 2.9), value_levels=(0.1, 1, 2, 2.9)),
        MixKVQConfig.preset("kvquant-2", key_axis="token", key_group=16, key_levels=(0.1, 1, 2, 2.9)),
    ],
)
def test_attention_reads_what_is_stored(config: MixKVQConfig):
    past, step = random_step(2, 300), random_step(2, 2)
    cache = filled(config, past)
    output = cache.attend(step, None, scaling=0.25)
    k, v = stored(cache)
    slots = [0, *range(1, 44)]  # the sink, and the residual
    keys = torch.cat([k, cache.store.dense_keys[0, :, slots], step.keys[0]], 1).repeat_interleave(2, 0)
    values = torch.cat([v, cache.store.dense_values[0, :, slots], step.values[0]], 1).repeat_interleave(2, 0)
    logits = step.query[0] @ keys.transpose(1, 2) * 0.25
    logits[:, 0, -1] = float("-inf")
    assert torch.allclose(output[0], logits.softmax(-1) @ values, atol=3e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"key_levels": (0, 1, 2)},
            "key_levels is none, or for 2 bits a list of 4 rising numbers from 0 to 3; key_lev",
        ),
        ({"value_levels": (0, 2, 1, 3)}, "value_levels is none, or for 2 bits a list of 4 rising numbers"),
        ({"value_levels": (0, 1, 2, 4)}, "rising numbers from 0 to 3"),
        ({"key_levels": "0/1/2/3"}, "rising numbers from 0 to 3"),
        ({"key_bits": 16, "key_levels": (0, 1, 2, 3)}, "key_levels is none, or for 16 bits"),
        (
            {"key_levels": (0, 1, 2, 3), "key_clip": True},
            "whole range of a group: set key_clip and key_unbiased to false",
        ),
        ({"key_levels": (0, 1, 2, 3), "key_feedback": 0.4}, "key_levels takes keys that are rounded each for itself"),
        ({"outliers": 0.2}, "outliers is a share from 0 to 0.1; outliers=0.2"),
        ({"outliers": None}, "outliers is a share from 0 to 0.1"),
        ({"value_rotation": "hadamard"}, "A rotation spreads outliers, and outliers keeps them apart"),
        ({"policy": "kitty", "budget": 2.5}, "outliers takes a policy that promotes no channels, unlike kitty"),
    ],
)
def test_what_does_not_go_together(fields: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        MixKVQConfig.preset("kvquant-2", **fields)


def test_levels_by_layer_survive_json():
    layers = [{"key_levels": [0.1, 1, 2, 3]}, {}]
    config = MixKVQConfig.preset("kvquant-2", layers=layers)
    assert MixKVQConfig.from_json(config.to_json()) == config
    assert config.for_layer(0).key_levels == (0.1, 1, 2, 3)
    assert len({config.for_layer(0), config.for_layer(1)}) == 2  # they can be told apart by hash
