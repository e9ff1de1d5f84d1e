"""Numbers that are kept apart: which they are, that ranges shrink without them, that they come back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkvq.quant.outliers import put_outliers, take_outliers


def test_worked_example():
    # Two channels of 8 tokens in groups of 4. Medians are the lower of the middle two.
    channels = torch.tensor([[1.0, 2, 3, 90, 4, 5, 5, 6], [100.0, 100, 100, 100, 0, -1, -2, -40]])
    rest, outliers = take_outliers(channels.T[None, None], 2, dim=2, group=4)
    assert outliers is not None
    assert outliers.at.tolist() == [[[3 * 2 + 0, 7 * 2 + 1]]]  # token 3 of the first channel, token 7 of the second
    assert outliers.values.tolist() == [[[90.0, -40.0]]]
    expected = channels.clone()
    expected[0, 3], expected[1, 7] = 2.0, -2.0
    assert torch.equal(rest[0, 0].T, expected)


def test_a_token_s_outliers_are_measured_against_its_own_group():
    tokens = torch.tensor([[1.0, 2, 3, 20, 1000.0, 2000, 3000, 4000]])
    _, outliers = take_outliers(tokens[None, None], 1, dim=3, group=4)
    assert outliers is not None
    assert outliers.values.item() == 20.0


def test_none_are_taken_for_a_count_of_0():
    x = torch.randn(1, 2, 8, 4)
    rest, outliers = take_outliers(x, 0, dim=2, group=4)
    assert rest is x
    assert outliers is None


@given(seed=st.integers(0, 2**31), count=st.integers(1, 40), dim=st.sampled_from((2, 3)))
@settings(max_examples=40, deadline=None)
def test_put_back_they_make_up_for_what_was_taken(seed: int, count: int, dim: int):
    x = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
    rest, outliers = take_outliers(x, count, dim=dim, group=4)
    assert outliers is not None
    assert outliers.at.shape == (2, 3, count)
    assert (outliers.at.diff(dim=-1) > 0).all()
    assert torch.equal(put_outliers(rest.float(), outliers), x.float())
    for end in (torch.amax, torch.amin):  # what takes their place widens no range
        reduced = [end(t.float().unflatten(dim, (-1, 4)), dim + 1) for t in (rest, x)]
        assert (reduced[0] <= reduced[1]).all() if end is torch.amax else (reduced[0] >= reduced[1]).all()
