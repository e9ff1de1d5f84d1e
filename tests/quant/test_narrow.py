"""Codes that lose half their bits: by hand, against the paper's shifts, and against quantizing anew."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixkvq.quant.affine import quantize
from mixkvq.quant.narrow import narrow_codes, narrow_scale


def test_by_hand():
    # Of 16 codes every fifth is kept: 0, 5, 10, 15. 7 is nearer to 5, 8 to 10.
    codes = torch.tensor([0, 2, 3, 7, 8, 12, 13, 15], dtype=torch.uint8)
    assert narrow_codes(codes, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert narrow_codes(codes, 4).dtype == torch.uint8
    assert narrow_scale(torch.tensor([0.5]), 4, torch.float16).tolist() == [2.5]
    assert narrow_scale(torch.tensor([2.0]), 8, torch.float16).tolist() == [34.0]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_papers_integer_formula(bits: int):
    """1 / (2^n + 1) = (2^2n - 2^n + 1) / (2^3n + 1), which the public code takes by shifts alone."""
    n = bits // 2
    codes = torch.arange(2**bits, dtype=torch.int64)
    halves = 2 ** (3 * n - 1) - 2 ** (2 * n - 1) + 2 ** (n - 1)
    shifts = ((codes << 2 * n) - (codes << n) + codes + halves) >> 3 * n
    assert torch.equal(narrow_codes(codes.int(), bits).long(), shifts)


@given(st.integers(0, 1000))
def test_the_grid_is_that_of_quantizing_the_numbers_themselves(seed: int):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    wide, narrow = (
        quantize(x, torch.full((6, 1), bits), clip=False, unbiased=False, param_dtype=torch.float32) for bits in (8, 4)
    )
    codes, scale = narrow_codes(wide.codes, 8), narrow_scale(wide.scale, 8, torch.float32)
    assert torch.equal(wide.zero, narrow.zero)
    torch.testing.assert_close(scale, narrow.scale)
    assert int((codes.int() - narrow.codes.int()).abs().max()) <= 1  # where a number lies next to the middle of two
    assert ((codes * scale + wide.zero - x).abs() <= 0.51 * scale + 0.5 * wide.scale).all()
