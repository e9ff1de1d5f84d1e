"""Parts of attention merge to the whole."""

import torch

from mixkvq.kernels.partial import Partial, dense_attention, merge
from mixkvq.kernels.reference import attention


def test_two_parts_are_the_whole():
    query = torch.randn(2, 3, 2, 5, 16)
    keys, values = torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    parts = [dense_attention(query, keys[:, :, s], values[:, :, s], None, None) for s in (slice(0, 11), slice(11, 40))]
    whole = merge(parts).unflatten(2, (2, 5))
    for row in range(2):
        expected = attention(query[row].flatten(0, 1), keys[row], values[row], torch.ones(5, 40).bool(), scaling=1.0)
        assert torch.allclose(whole[row].flatten(0, 1), expected, atol=1e-5)


def test_a_row_that_sees_nothing_weighs_nothing():
    query, keys = torch.randn(1, 1, 1, 2, 8), torch.randn(1, 1, 4, 8)
    visible = torch.tensor([[True] * 4, [False] * 4])[None, None, None]
    blind = dense_attention(query, keys, keys, visible, None)
    assert blind.lse[0, 0, 1] == float("-inf")
    assert (blind.output[0, 0, 1] == 0).all()
    seen = dense_attention(query, keys, keys, None, None)
    assert torch.allclose(merge([blind, seen])[0, 0, 1], seen.output[0, 0, 1])
    nothing = Partial(blind.output[:, :, 1:], blind.lse[:, :, 1:])
    assert (merge([nothing, nothing]) == 0).all()
