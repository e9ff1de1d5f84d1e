"""RoPE: angles by hand, and that what was turned comes back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkvq.quant.rope import Rope


def test_two_channels_by_hand():
    # A quarter turn a token: (1, 0) at tokens 6, 7 and 8 has turned by 3, 3.5 and 4 half turns.
    keys = torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2)
    turned = Rope((math.pi / 2,)).apply(keys, torch.tensor([6]))
    assert torch.allclose(turned[0, 0], torch.tensor([[-1.0, 0.0], [0.0, -1.0], [1.0, 0.0]]), atol=1e-5)


@pytest.mark.parametrize(("interleaved", "expected"), [(False, [-3.0, 2.0, 1.0, 4.0, 5.0]), (True, [-2.0, 1, 3, 4, 5])])
def test_which_channels_are_a_pair(interleaved: bool, expected: list[float]):
    # A quarter turn of the first pair, none of the second; the last channel is in no pair.
    keys = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).expand(1, 1, 1, 5)
    turned = Rope((math.pi / 2, 0.0), interleaved).apply(keys, torch.tensor([1]))
    assert torch.allclose(turned.flatten(), torch.tensor(expected), atol=1e-6)


def test_without_pairs_nothing_is_turned():
    keys = torch.randn(2, 3, 4, 5)
    assert torch.equal(Rope().apply(keys, torch.tensor([3, 9])), keys)


def test_frequencies_of_llama():
    assert Rope.of_base(8, 10000.0).inv_freq == pytest.approx((1.0, 0.1, 0.01, 0.001))
    assert len(Rope.of_base(5).inv_freq) == 2


@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(0, 4),
    first=st.lists(st.integers(0, 100_000), min_size=2, max_size=2),
    interleaved=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
@settings(max_examples=40, deadline=None)
def test_it_is_a_rotation_and_comes_back(
    seed: int, pairs: int, first: list[int], interleaved: bool, dtype: torch.dtype
):
    x = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rope, first = Rope.of_base(2 * pairs, 100.0), torch.tensor(first)
    rope = Rope(rope.inv_freq, interleaved)
    turned = rope.apply(x, first)
    assert turned.dtype == torch.float32
    assert torch.allclose(turned.norm(dim=-1), x.float().norm(dim=-1), atol=1e-5)
    assert torch.allclose(rope.undo(turned, first), x.float(), atol=1e-5)


def test_logits_depend_on_distances_alone():
    query, key = torch.randn(2, 1, 1, 1, 8)
    rope = Rope.of_base(8)
    near, far = (
        rope.apply(query, torch.tensor([at])).flatten() @ rope.apply(key, torch.tensor([at - 5])).flatten()
        for at in (7, 1000)
    )
    assert float(near) == pytest.approx(float(far), abs=1e-3)
