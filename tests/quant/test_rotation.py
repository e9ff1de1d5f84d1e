"""Hadamard rotation."""

import pytest
import torch

from mixkvq.quant.rotation import hadamard, rotate


@pytest.mark.parametrize("size", [1, 2, 16, 64, 80, 96, 112, 128, 256])
def test_it_is_orthonormal_and_its_own_inverse(size: int):
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-5)
    assert torch.equal(matrix, matrix.T)


def test_worked_example():
    assert torch.allclose(rotate(torch.tensor([1.0, 0.0, 0.0, 0.0])), torch.full((4,), 0.5))
    assert torch.allclose(rotate(torch.tensor([0.0, 2.0])), torch.tensor([2.0, -2.0]) / 2**0.5)


def test_an_outlier_is_spread():
    x = torch.zeros(96)
    x[40] = 8.0
    assert rotate(x).abs().max() < 1.5  # within its block of 32: 8 / sqrt(32)


def test_no_size_below_one():
    with pytest.raises(ValueError, match="positive size, not 0"):
        hadamard(0)
