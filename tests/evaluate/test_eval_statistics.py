"""Intervals and paired tests against values worked out by hand and by scipy."""

import math

import pytest
from scipy.stats import binomtest

from mixkvq.evaluate.statistics import paired_p, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (7, 10), (431, 540)])
def test_wilson_is_scipys(successes: int, trials: int):
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high))


def test_wilson_by_hand():
    # z = 1.96, p = 1/2, n = 4: middle (.5 + z^2/8) / (1 + z^2/4) = .5, half z sqrt(1/16 + z^2/64) / (1 + z^2/4)
    z2 = 1.959964**2
    half = math.sqrt(z2) * math.sqrt(1 / 16 + z2 / 64) / (1 + z2 / 4)
    assert wilson(2, 4) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    low, high = wilson(2.5, 4)  # a mean over samples
    assert low < 0.625 < high


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (1, 5, 2 * 7 / 64),  # (1 + 6) of 64 ways have at most one, and as many at least five
        (3, 8, 2 * (1 + 11 + 55 + 165) / 2048),
    ],
)
def test_the_exact_paired_test_by_hand(better: int, worse: int, p: float):
    assert paired_p(better, worse) == pytest.approx(p)
