"""The page format: sizes worked by hand, fields that do not overlap."""

import pytest
import torch

from mixkvq import MixKVQConfig
from mixkvq.layers.expected import expected_bits
from mixkvq.layers.recipe import LayerShape, page_layout
from mixkvq.policies import policy_class


def layout(text: str, kv_heads: int = 2, dim: int = 64, dtype: torch.dtype = torch.bfloat16):
    config = MixKVQConfig.parse(text)
    return page_layout(config, policy_class(config.policy)(config), LayerShape(kv_heads, dim, dim, dtype))


def test_bytes_of_a_page_of_kivi_2():
    # 2 heads x 64 channels x 128 tokens: 2 bits of code, 2 x 16 bits per 32 of them
    parts = layout("kivi-2").part_bytes({})
    elements = 2 * 64 * 128
    assert parts["key codes"] == parts["value codes"] == elements * 2 // 8
    assert parts["key scales"] == parts["value scales"] == elements // 32 * 4
    assert layout("kivi-2").page.nbytes == sum(parts.values()) == elements * 6 // 8


def test_bytes_of_a_page_of_the_default():
    parts = layout("default").part_bytes({4: 47})
    # 47 channels take 3 chunks of 16, each 16 channels x 128 tokens x 2 bits and 16 channel numbers
    assert parts["key codes"] == 2 * 64 * 128 * 2 // 8 + 3 * 16 * 128 * 2 // 8
    assert parts["key scales"] == 2 * 64 * 4
    assert parts["value scales"] == 2 * 128 * 2  # no zeros
    assert parts["tier index"] == 3 * 16 + 16 + 16  # chunks; the page's run and first lanes, aligned


def test_a_dense_channel_costs_itself():
    with_one, without = (layout("paper").part_bytes({4: 0, 16: n}) for n in (1, 0))
    assert with_one["key codes"] - without["key codes"] == 128 * 2
    # kept in 16 bits even where the model computes in 32
    assert layout("paper", dtype=torch.float32).part_bytes({16: 1})["key codes"] == with_one["key codes"]


def test_keys_with_scales_per_token_cost_what_values_do():
    parts = layout("kivi-2:key_axis=token,key_group=1024,value_group=1024").part_bytes({})
    assert parts["key codes"] == parts["value codes"] == 2 * 64 * 128 * 2 // 8
    assert parts["key scales"] == parts["value scales"] == 2 * 128 * 4  # a scale and a zero of every token and head


def test_promoted_channels_need_scales_of_their_own():
    config = MixKVQConfig.parse("kivi-2:key_axis=token")
    own = policy_class("mixkvq")(MixKVQConfig.preset("default"))
    with pytest.raises(ValueError, match=r"Channels promoted to \(4,\) bits need key scales of their own"):
        page_layout(config, own, LayerShape(2, 64, 64, torch.bfloat16))


TEXTS = ["default", "paper", "kivi-4", "kivi-2:key_bits=3,value_bits=3", "kivi-2:key_axis=token", "bf16"]


@pytest.mark.parametrize("text", TEXTS)
def test_fields_do_not_overlap_and_are_aligned(text: str):
    page_layout = layout(text, kv_heads=3, dim=40)
    for record in (page_layout.page, *page_layout.chunks.values()):
        data = torch.zeros(3, record.nbytes, dtype=torch.uint8)
        views = record.views(data)
        for number, (name, view) in enumerate(views.items(), start=1):
            assert record.offsets[name] % 16 == 0
            view[1].view(torch.uint8).fill_(number)
        for number, (name, view) in enumerate(views.items(), start=1):
            assert (view[1].view(torch.uint8) == number).all(), name
        assert not data[0].any()
        assert not data[2].any()


@pytest.mark.parametrize(
    ("text", "keys", "values"),
    [("kivi-2", 3.0, 3.0), ("kivi-4", 5.0, 5.0), ("bf16", 16.0, 16.0), ("kitty", 2.51, 2.25), ("default", 3.12, 2.25)],
)
def test_expected_bits_of_a_large_model(text: str, keys: float, values: float):
    key_bits, value_bits, final = expected_bits(MixKVQConfig.parse(text), kv_heads=8, head_dim=128)
    assert final
    assert key_bits == pytest.approx(keys, abs=0.01)
    assert value_bits == values


def test_bits_of_thresholds_are_a_floor():
    assert expected_bits(MixKVQConfig.parse("paper"), 8, 128)[2] is False
