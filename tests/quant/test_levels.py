"""Levels that are not uniform: nearest codes, what they stand for, and how they are fitted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkvq.quant.affine import dequantize, quantize
from mixkvq.quant.levels import count, fit_levels, nearest, new_histogram, positions, to_levels

LEVELS = (0.0, 0.5, 2.5, 3.0)


def test_worked_example():
    # Range 0 to 6: a step is 2, and the levels stand for 0, 1, 5 and 6.
    x = torch.tensor([[0.0, 1.4, 3.4, 6.0]])
    q = to_levels(x, quantize(x, 2), LEVELS)
    assert q.codes.tolist() == [[0, 1, 2, 3]]
    assert dequantize(positions(q.codes, LEVELS), q.scale, q.zero).tolist() == [[0.0, 1.0, 5.0, 6.0]]


@given(seed=st.integers(0, 2**31), bits=st.sampled_from((2, 3, 4)))
@settings(max_examples=30, deadline=None)
def test_uniform_levels_are_no_levels(seed: int, bits: int):
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
    plain = quantize(x, bits, param_dtype=torch.float16)
    q = to_levels(x, plain, tuple(map(float, range(2**bits))))
    assert (q.codes != plain.codes).float().mean() < 0.01  # halves round to even, or down
    assert torch.equal(positions(plain.codes, None), plain.codes)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_no_level_is_nearer(seed: int):
    generator = torch.Generator().manual_seed(seed)
    levels = tuple(torch.rand(8, generator=generator).mul(7).sort().values.tolist())
    at = torch.rand(100, generator=generator) * 7
    distance = (at - positions(nearest(at, levels), levels)).abs()
    assert torch.allclose(distance, (at[:, None] - torch.tensor(levels)).abs().amin(1))


def test_constant_groups_come_back_exactly():
    x = torch.full((2, 16), 1.5)
    q = to_levels(x, quantize(x, 2), LEVELS)
    assert (dequantize(positions(q.codes, LEVELS), q.scale, q.zero) == 1.5).all()


def test_levels_move_to_where_the_weight_is():
    histogram = new_histogram(2)
    # Two heaps that level 1 shares, 0.8 with three times the weight of 1.2, and one at 2.9; nothing near level 2.
    count(histogram, torch.tensor([0.1, 0.8, 1.2, 2.9]), torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert fit_levels(histogram, 2) == pytest.approx((0.1, 0.9, 2.0, 2.9), abs=1 / 128)


def test_an_empty_histogram_gives_uniform_levels():
    assert fit_levels(new_histogram(3), 3) == (0, 1, 2, 3, 4, 5, 6, 7)


def test_fitted_levels_are_better_than_uniform_ones():
    x = torch.randn(500, 64)
    plain = quantize(x, 2)
    histogram = new_histogram(2)
    count(histogram, (x - plain.zero) / plain.scale, plain.scale.square().expand_as(x))
    levels = fit_levels(histogram, 2)
    fitted = to_levels(x, plain, levels)
    errors = [
        (dequantize(positions(q.codes, table), q.scale, q.zero) - x).square().mean()
        for q, table in ((fitted, levels), (plain, None))
    ]
    assert errors[0] < 0.7 * errors[1]
