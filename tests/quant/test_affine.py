"""Quantization of groups: worked examples, error bounds, constants, the two refinements."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkvq.quant.affine import dequantize, quantize, symmetric_zero

WIDTHS = (1, 2, 3, 4, 8)


def groups(seed: int, count: int, size: int, offset: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator) * spread + offset


def test_worked_example():
    q = quantize(torch.tensor([[0.0, 1.0, 2.4, 6.0]]), 2)
    assert q.scale.item() == 2.0
    assert q.zero.item() == 0.0
    # 1.0 / 2 = 0.5 rounds half to even
    assert q.codes.tolist() == [[0, 0, 1, 3]]
    assert dequantize(*q).tolist() == [[0.0, 0.0, 2.0, 6.0]]


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 130),
    bits=st.sampled_from(WIDTHS),
    offset=st.floats(-50, 50),
    spread=st.floats(1e-3, 100),
)
@settings(max_examples=80, deadline=None)
def test_error_is_at_most_half_a_step(seed: int, size: int, bits: int, offset: float, spread: float):
    x = groups(seed, 3, size, offset, spread)
    q = quantize(x, bits)
    assert int(q.codes.max()) < 2**bits
    error = (dequantize(*q) - x).abs()
    assert (error <= q.scale / 2 + 1e-5 * (x.abs() + spread)).all()


@given(seed=st.integers(0, 2**31), bits=st.sampled_from(WIDTHS), offset=st.floats(-100, 100))
@settings(max_examples=40, deadline=None)
def test_codes_make_up_for_the_rounding_of_stored_parameters(seed: int, bits: int, offset: float):
    x = groups(seed, 4, 32, offset)
    q = quantize(x, bits, param_dtype=torch.float16)
    assert torch.equal(q.scale, q.scale.half().float())
    assert torch.equal(q.zero, q.zero.half().float())
    assert (q.zero <= x.amin(-1, keepdim=True)).all()
    # Half a step, plus what float16 does to a scale over 2^bits - 1 steps.
    bound = q.scale * (0.5 + 2**bits * 2.0**-11) + 1e-4
    assert ((dequantize(*q) - x).abs() <= bound).all()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.5, -3.25, 40000.0])
def test_constant_groups_come_back_exactly(value: float, clip: bool, unbiased: bool):
    x = torch.full((2, 32), value)
    q = quantize(x, 2, clip=clip, unbiased=unbiased, param_dtype=torch.float16)
    assert (q.scale == 0).all()
    assert torch.equal(dequantize(*q), x)


def test_parameters_outside_their_type_stay_finite():
    x = torch.tensor([[-3e5, 3e5, 0.0, 1.0]])
    q = quantize(x, 2, param_dtype=torch.float16)
    assert q.scale.isfinite().all()
    assert q.zero.isfinite().all()


def test_width_per_group():
    x = groups(1, 3, 64)
    bits = torch.tensor([[2], [4], [8]])
    q = quantize(x, bits)
    for row in range(3):
        alone = quantize(x[row : row + 1], int(bits[row]))
        assert torch.equal(q.codes[row : row + 1], alone.codes)


@pytest.mark.parametrize("seed", range(5))
def test_clipping_never_raises_the_squared_error(seed: int):
    x = groups(seed, 64, 64)
    x[:, 0] *= 6  # an outlier that a smaller range gives up
    plain, clipped = quantize(x, 2), quantize(x, 2, clip=True)
    error, clipped_error = ((dequantize(*q) - x).square().sum(-1) for q in (plain, clipped))
    assert (clipped_error <= error).all()
    assert clipped_error.sum() < 0.8 * error.sum()


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float16])
def test_unbiased_groups_are_not_shrunk(bits: int, param_dtype: torch.dtype):
    x = groups(3, 256, 64, offset=2.0)

    def kept(unbiased: bool) -> torch.Tensor:
        restored = dequantize(*quantize(x, bits, clip=True, unbiased=unbiased, param_dtype=param_dtype))
        centred = x - x.mean(-1, keepdim=True)
        return (centred * (restored - restored.mean(-1, keepdim=True))).sum(-1) / centred.square().sum(-1)

    assert torch.allclose(kept(True), torch.ones(256), atol=3e-3)
    assert kept(False).mean() < 0.985


def test_unbiased_keeps_the_mean():
    x = groups(4, 32, 128, offset=-7.0)
    restored = dequantize(*quantize(x, 2, clip=True, unbiased=True))
    assert torch.allclose(restored.mean(-1), x.mean(-1), atol=1e-4)


def test_a_group_with_nan_leaves_the_others_alone():
    x = groups(5, 3, 32)
    clean = quantize(x, 2, clip=True, unbiased=True)
    x[1, 4] = float("nan")
    q = quantize(x, 2, clip=True, unbiased=True)
    for row in (0, 2):
        assert torch.equal(dequantize(*q)[row], dequantize(*clean)[row])


def test_symmetric_groups_by_hand():
    x = torch.tensor([[-3.0, -1.1, 0.9, 3.0], [0.0, 0.0, 0.0, 0.0], [0.25, 0.1, 0.3, 0.1]])
    q = quantize(x, 2, symmetric=True)
    assert q.scale[:, 0].tolist() == pytest.approx([2.0, 0.0, 0.2])
    assert torch.equal(q.zero, symmetric_zero(q.scale, 2))
    assert dequantize(*q)[0].tolist() == [-3.0, -1.0, 1.0, 3.0]
    assert not dequantize(*q)[1].any()
    assert dequantize(*q)[2].tolist() == pytest.approx([0.3, 0.1, 0.3, 0.1])


@pytest.mark.parametrize(("bits", "most"), [(2, 1.01), (3, 1.15)])
def test_gaussian_values_lose_next_to_nothing_without_zeros(bits: int, most: float):
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for symmetric in (False, True):
        q = quantize(x, bits, clip=True, symmetric=symmetric, param_dtype=torch.float16)
        errors.append((dequantize(*q) - x).square().mean().item())
    assert errors[1] < most * errors[0]


def test_symmetric_groups_can_be_unbiased():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    q = quantize(x, 2, clip=True, unbiased=True, symmetric=True)
    assert torch.allclose((x * dequantize(*q)).sum(-1), x.square().sum(-1), rtol=1e-5)
    assert torch.equal(q.zero, symmetric_zero(q.scale, 2))


def test_ranges_of_four_bits_are_not_searched():
    x = torch.randn(20, 64)
    x[:, 0] = 9  # which a smaller range would cut off
    for symmetric in (False, True):
        plain, clipped = (quantize(x, 4, clip=clip, symmetric=symmetric) for clip in (False, True))
        assert torch.equal(plain.scale, clipped.scale)
        plain, clipped = (quantize(x, 2, clip=clip, symmetric=symmetric) for clip in (False, True))
        assert (clipped.scale < plain.scale).all()
