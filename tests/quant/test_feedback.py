"""Errors of early channels are made up for by later ones, as the queries weigh them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkvq.quant.affine import dequantize
from mixkvq.quant.block import quantize_keys
from mixkvq.quant.feedback import Feedback, quantize_with_feedback, rounding_order

OPTIONS = {"clip": False, "unbiased": False, "param_dtype": torch.float32}


def restored(keys: torch.Tensor, bits: torch.Tensor, feedback: Feedback | None, **options) -> torch.Tensor:
    q = quantize_keys(keys, bits, group=keys.shape[2], feedback=feedback, **{**OPTIONS, **options})
    codes = q.codes.float()
    out = codes * q.scale + q.zero
    return torch.where((bits == 16)[:, :, None], keys, out)


def logit_error(keys: torch.Tensor, other: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """``(k - k~)^T H (k - k~)``, summed over the tokens: ``[N, Hkv]``."""
    error = keys - other
    return torch.einsum("nhtd,nhde,nhte->nh", error, covariance, error)


def random_problem(dim: int = 8, tokens: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[2, 3, R, D]`` with channels of different size, and covariances of correlated queries."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, tokens, dim, generator=generator) * torch.logspace(-1, 1, dim)
    mixing = torch.randn(2, 3, dim, dim, generator=generator)
    queries = torch.randn(2, 3, 100, dim, generator=generator) @ mixing
    return keys, queries.transpose(2, 3) @ queries / 100


def test_two_channels_by_hand():
    # H = [[4, 2], [2, 4]] = U D U^T with U = [[1, 1/2], [0, 1]]: the second makes up for half of the first one's error.
    covariance = torch.tensor([[4.0, 2.0], [2.0, 4.0]]).view(1, 1, 2, 2)
    feedback = Feedback.of(covariance, torch.tensor([[[2.0, 1.0]]]), damping=1e-9)
    assert feedback.order.tolist() == [[[0, 1]]]
    assert torch.allclose(feedback.weights, torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    # At 1 bit the first channel becomes 0, 0, 3, 3; its errors are 0, 1, -1, 0.
    keys = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 4.0, 4.0, 0.0]]).view(1, 1, 2, 1, 4)
    bits, exact = torch.tensor([[[1, 1]]]), torch.zeros(1, 1, 2, dtype=torch.bool)
    q = quantize_with_feedback(keys, bits, exact, feedback, **OPTIONS)
    assert dequantize(*q)[0, 0, 0].tolist() == [[0, 0, 3, 3]]
    # The second is moved to 0, 4.5, 3.5, 0 before it is rounded.
    assert dequantize(*q)[0, 0, 1].tolist() == [[0, 4.5, 4.5, 0]]


def test_the_factor_gives_the_covariance_back():
    _, covariance = random_problem()
    salience = torch.rand(2, 3, 8)
    order, weights = Feedback.of(covariance, salience, damping=1e-6)
    assert torch.equal(weights, weights.triu())
    ordered = covariance.gather(2, order[..., None].expand(-1, -1, -1, 8)).gather(
        3, order[:, :, None].expand(-1, -1, 8, -1)
    )
    inverse = torch.linalg.inv(weights)
    middle = inverse @ ordered @ inverse.transpose(2, 3)
    assert torch.allclose(
        middle, torch.diag_embed(middle.diagonal(dim1=2, dim2=3)), atol=1e-3 * float(ordered.abs().max())
    )


def test_it_is_what_gptq_does():
    """The same numbers as eliminating channels from the inverse, the form in which GPTQ is published."""
    keys, covariance = random_problem()
    bits = torch.where(torch.rand(2, 3, 8) < 0.3, 4, 2).to(torch.uint8)
    feedback = Feedback.of(covariance, torch.rand(2, 3, 8), damping=0.1)
    ours = restored(keys, bits, feedback)
    for n, h in itertools.product(range(2), range(3)):
        order = feedback.order[n, h]
        H = covariance[n, h][order][:, order].double()
        inverse = torch.linalg.inv(H / H.diagonal().mean() + 0.1 * torch.eye(8))
        left = keys[n, h][:, order].double()
        for i in range(8):
            column = left[:, i].float()[None, None, :, None]
            rounded = restored(column, bits[n, h][order[i]][None, None, None], None)[0, 0, :, 0].double()
            error = (left[:, i] - rounded) / inverse[i, i]
            left -= error[:, None] * inverse[i]
            inverse -= torch.outer(inverse[i].clone(), inverse[i].clone()) / inverse[i, i]
            assert torch.allclose(rounded.float(), ours[n, h][:, order[i]], atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
def test_logits_come_out_better(clip: bool):
    keys, covariance = random_problem(dim=16, tokens=128)
    bits = torch.full((2, 3, 16), 2, dtype=torch.uint8)
    bits[:, :, -4:] = 4
    feedback = Feedback.of(covariance, rounding_order(keys, covariance, bits == 16, group=128, bits=2), damping=0.05)
    plain, fed = (restored(keys, bits, f, clip=clip) for f in (None, feedback))
    assert (logit_error(keys, fed, covariance) < 0.8 * logit_error(keys, plain, covariance)).all()


def test_queries_that_see_channels_apart_change_nothing():
    keys, _ = random_problem()
    bits = torch.full((2, 3, 8), 2, dtype=torch.uint8)
    apart = torch.diag_embed(torch.rand(2, 3, 8) + 0.1)
    for covariance in (apart, torch.zeros_like(apart)):  # zero: no query was seen yet
        feedback = Feedback.of(covariance, torch.rand(2, 3, 8), damping=0.2)
        assert torch.equal(restored(keys, bits, feedback), restored(keys, bits, None))


def test_channels_that_are_stored_as_they_are_cause_no_error():
    keys, covariance = random_problem()
    bits = torch.full((2, 3, 8), 16, dtype=torch.uint8)
    bits[:, :, 3] = 2
    salience = torch.arange(8.0).expand(2, 3, 8)  # all but three of the exact channels come first
    fed = restored(keys, bits, Feedback.of(covariance, salience, damping=0.1))
    assert torch.equal(fed, restored(keys, bits, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_turns_feedback_off(bad: float):
    keys, covariance = random_problem()
    covariance[0, 1, 2, 3] = covariance[0, 1, 3, 2] = covariance[0, 1, 2, 2] = bad
    bits = torch.full((2, 3, 8), 2, dtype=torch.uint8)
    feedback = Feedback.of(covariance, torch.rand(2, 3, 8), damping=0.2)
    plain, fed = restored(keys, bits, None), restored(keys, bits, feedback)
    assert torch.equal(fed[0, 1], plain[0, 1])
    assert not torch.equal(fed[0, 0], plain[0, 0])


def test_channels_that_are_stored_as_they_are_come_first():
    keys, covariance = random_problem()
    exact = torch.zeros(2, 3, 8, dtype=torch.bool)
    exact[:, :, 5] = True
    order = rounding_order(keys, covariance, exact, group=32, bits=2).argsort(-1, descending=True)
    assert (order[:, :, 0] == 5).all()


@pytest.mark.parametrize(("dim", "parts"), [(128, 1), (144, 2), (256, 2), (288, 3)])
def test_large_heads_are_cut_into_parts(dim: int, parts: int):
    keys, covariance = random_problem(dim=dim)
    bits = torch.full((2, 3, dim), 2, dtype=torch.uint8)
    salience = torch.rand(2, 3, dim)
    together = restored(keys, bits, Feedback.of(covariance, salience, damping=0.2))
    for part in range(parts):
        own = slice(part, None, parts)
        feedback = Feedback.of(covariance[:, :, own, own], salience[:, :, own], damping=0.2)
        alone = restored(keys[..., own], bits[..., own], feedback)
        assert ((together[..., own] - alone).abs() > 1e-4).float().mean() < 1e-3  # another order of sums


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-12, 1.0, 1e9]), rank=st.integers(0, 8))
def test_any_covariance_can_be_factored(seed: int, scale: float, rank: int):
    generator = torch.Generator().manual_seed(seed)
    queries = scale * torch.randn(1, 1, rank, 8, generator=generator)
    covariance = queries.transpose(2, 3) @ queries
    weights = Feedback.of(covariance, torch.rand(1, 1, 8, generator=generator), damping=0.05).weights
    assert weights.isfinite().all()
    assert torch.allclose(weights.diagonal(dim1=2, dim2=3), torch.ones(8))


def test_a_part_that_is_not_finite_leaves_the_other_alone():
    keys, covariance = random_problem(dim=144)
    covariance[..., 2, 2] = torch.inf  # channel 2 is of part 0
    bits = torch.full((2, 3, 144), 2, dtype=torch.uint8)
    fed = restored(keys, bits, Feedback.of(covariance, torch.rand(2, 3, 144), damping=0.2))
    plain = restored(keys, bits, None)
    assert torch.equal(fed[..., ::2], plain[..., ::2])
    assert not torch.equal(fed[..., 1::2], plain[..., 1::2])
