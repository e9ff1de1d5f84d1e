"""Symmetric INT8: by hand, and its bound."""

import torch

from mixkvq.quant.int8 import quantize_int8


def test_by_hand():
    x = torch.tensor([[2.54, 0.0], [-1.27, 0.0], [0.013, 0.0]])  # scale 2.54 / 127 = .02; the second channel is 0
    codes, scale = quantize_int8(x, torch.float32)
    assert codes.tolist() == [[127, 0], [-64, 0], [1, 0]]  # -63.5 and .65 to the nearest, ties to even
    assert codes.dtype == torch.int8
    assert torch.allclose(scale, torch.tensor([0.02, 0.0]))


def test_no_number_is_off_by_more_than_half_a_step():
    x = torch.randn(3, 2, 32, 16) * torch.logspace(-2, 2, 16)
    codes, scale = quantize_int8(x, torch.float16)
    assert scale.dtype == torch.float16
    step = scale.float().unsqueeze(-2)
    # A scale that was rounded down to float16 cannot reach the largest number by as much as it lacks.
    assert bool(((codes * step - x).abs() <= 0.5 * step * 1.001 + 127 * step * 2**-11).all())


def test_huge_numbers_stay_finite():
    codes, scale = quantize_int8(torch.full((4, 2), 1e9), torch.float16)
    assert bool(scale.isfinite().all())
    assert (codes == 127).all()
