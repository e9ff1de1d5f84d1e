"""Bit planes: the layout word by word, and round trips at every width and odd size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkvq.quant.planes import join_planes, pack, plane_widths, split_planes, unpack, words_per_page


def test_where_a_token_lies():
    # Token 37 of a page of 128: word 37 % 16 = 5, position 37 // 16 = 2, so bits 4 and 5.
    codes = torch.zeros(128, 1, dtype=torch.uint8)
    codes[37] = 3
    words = pack(codes, 2, dim=-2)
    assert words.shape == (16, 1)
    assert words[5].item() == 3 << 4
    assert words.count_nonzero() == 1


def test_the_highest_position_is_the_sign():
    codes = torch.zeros(128, 1, dtype=torch.uint8)
    codes[7 * 16] = 2
    assert pack(codes, 2, dim=-2)[0].item() == -32768
    assert unpack(pack(codes, 2, dim=-2), 2, dim=-2)[7 * 16].item() == 2


def test_one_bit_plane_holds_sixteen_codes_a_word():
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[2 * 3 + 1] = 1  # 2 words; token 7 is word 1, position 3
    assert pack(codes, 1, dim=-2).flatten().tolist() == [0, 1 << 3]


@pytest.mark.parametrize(("bits", "widths"), [(1, (1,)), (2, (2,)), (3, (2, 1)), (4, (2, 2)), (8, (2, 2, 2, 2))])
def test_widths(bits: int, widths: tuple[int, ...]):
    assert plane_widths(bits) == widths
    assert sum(words_per_page(128, width) for width in widths) == 128 * bits // 16


def test_the_first_plane_is_the_most_significant():
    planes = split_planes(torch.tensor([0b1101], dtype=torch.uint8), 4)
    assert [plane.item() for plane in planes] == [0b11, 0b01]


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from((1, 2, 3, 4, 6, 8)),
    tokens=st.sampled_from((16, 32, 48, 128, 256)),
    channels=st.integers(1, 9),
    tokens_last=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_round_trip(seed: int, bits: int, tokens: int, channels: int, tokens_last: bool):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, tokens, channels), generator=generator, dtype=torch.uint8)
    dim = -2
    if tokens_last:
        codes, dim = codes.transpose(2, 3).contiguous(), -1
    restored = []
    for plane, width in zip(split_planes(codes, bits), plane_widths(bits), strict=True):
        words = pack(plane, width, dim)
        assert words.dtype == torch.int16
        assert words.shape[dim] == words_per_page(tokens, width)
        restored.append(unpack(words, width, dim))
    assert torch.equal(join_planes(restored, bits).to(torch.uint8), codes)


def test_unpacking_what_is_not_contiguous():
    words = torch.randint(-32768, 32767, (4, 6, 16), dtype=torch.int16)
    expected = unpack(words, 2, dim=-2)
    assert torch.equal(unpack(words.transpose(1, 2).contiguous().transpose(1, 2), 2, dim=-2), expected)


def test_tokens_that_fill_no_word_are_refused():
    with pytest.raises(ValueError, match="do not fill whole words"):
        pack(torch.zeros(12, 1, dtype=torch.uint8), 2, dim=-2)


def test_a_missing_plane_is_refused():
    with pytest.raises(ValueError, match="4 bits take 2 planes, 1 were given"):
        join_planes([torch.zeros(1, dtype=torch.uint8)], 4)
