"""Choosing one option for each of many parts within a budget: the integer program behind budgets by layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mixkvq.calibrate.errors import CalibrationError, needed

#: What solves it.
SOLVER = "scipy.optimize"


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The options of least summed cost whose sizes add up to at most ``budget`` (a multiple-choice knapsack).

    Args:
        costs: of every part, what each of its options costs.
        sizes: alike, what each takes.

    Returns:
        The number of each part's option.

    Raises:
        CalibrationError: even the smallest options take more.
    """
    optimize = needed(SOLVER)
    floor = sum(min(part) for part in sizes)
    if floor > budget:
        raise CalibrationError(f"A budget of {budget:.6g} is below the floor: the smallest options take {floor:.6g}.")
    cost = [each for part in costs for each in part]
    size = [each for part in sizes for each in part]
    owner = [part for part, options in enumerate(costs) for _ in options]
    one_each = [[float(other == part) for other in owner] for part in range(len(costs))]
    scale = max(*map(abs, cost), 1e-30)  # tolerances of the solver are absolute
    found = optimize.milp(
        [each / scale for each in cost],
        integrality=[1] * len(cost),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint([size], ub=budget),
        ],
        options={"mip_rel_gap": 1e-4},
    )
    if found.x is None:
        raise CalibrationError(f"No choice within a budget of {budget:.6g} was found: {found.message}")
    starts = itertools.accumulate((len(part) for part in costs), initial=0)
    return [int(found.x[start : start + len(part)].argmax()) for start, part in zip(starts, costs, strict=False)]
