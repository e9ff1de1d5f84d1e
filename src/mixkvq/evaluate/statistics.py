"""How sure a share is, whether two caches differ, and which of several none beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from mixkvq.evaluate.errors import needed


def wilson(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share of ``trials``, of which ``successes`` (a mean may make it a fraction) succeeded."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def paired_p(better: int, worse: int) -> float:
    """McNemar's exact two-sided p-value of ``better`` and ``worse`` pairs; those that are equal say nothing.

    Raises:
        EvaluationError: scipy is not installed.
    """
    if better + worse == 0:
        return 1.0
    return float(needed("scipy.stats").binomtest(better, better + worse).pvalue)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that none beats in both coordinates (smaller is better), by rising first coordinate."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front
