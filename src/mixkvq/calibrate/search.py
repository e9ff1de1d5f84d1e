"""Searches for what loses little and takes few bits: two objectives, by Optuna's samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mixkvq.calibrate.errors import CalibrationError, needed
from mixkvq.evaluate.statistics import pareto_front

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """What was tried, and what came of it.

    Attributes:
        params: by name.
        bits: what it takes; fewer is better.
        loss: what it loses; less is better.
    """

    params: dict[str, Any]
    bits: float
    loss: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def search(
    sampler: BaseSampler,
    space: Mapping[str, BaseDistribution],
    measure: Callable[[Params], tuple[float, float]],
    tries: int,
    *,
    first: Iterable[Params] = (),
    advance: Callable[[], None] = lambda: None,
) -> list[Point]:
    """Let a sampler propose parameters, and learn bits and loss of each.

    Given the seed of its sampler a search repeats itself. One that was interrupted goes on by being run again, with a
    ``measure`` that keeps what it measured (:meth:`mixkvq.calibrate.trials.Trials.once`): it ends as it would have.

    Args:
        space: what may be proposed.
        measure: bits and loss of parameters.
        tries: proposals.
        first: parameters to try before the sampler's own.
        advance: called after each.

    Returns:
        All that were tried, in order.

    Raises:
        CalibrationError: there is nothing to try, or Optuna is missing.
    """
    check_tries(tries)
    optuna = needed("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])
    for params in first:
        study.enqueue_trial(dict(params), skip_if_exists=True)
    points = []
    for _ in range(tries):
        trial = study.ask(dict(space))
        bits, loss = measure(trial.params)
        study.tell(trial, (bits, loss))
        points.append(Point(trial.params, bits, loss))
        advance()
    return points


def check_tries(tries: int) -> None:
    """Refuse a search of nothing.

    Raises:
        CalibrationError: there is nothing to try.
    """
    if tries < 1:
        raise CalibrationError(f"--tries {tries}: try at least one.")


def nsga2(seed: int, population: int) -> BaseSampler:
    """The genetic sampler NSGA-II, with generations of ``population``.

    Raises:
        CalibrationError: Optuna is missing.
    """
    return needed("optuna").samplers.NSGAIISampler(seed=seed, population_size=population)


def tpe(seed: int) -> BaseSampler:
    """The sampler by tree-structured Parzen estimators.

    Raises:
        CalibrationError: Optuna is missing.
    """
    return needed("optuna").samplers.TPESampler(seed=seed)


def front(points: Sequence[Point]) -> list[Point]:
    """Points that none beats in both objectives, by rising bits."""
    return [points[i] for i in pareto_front([(point.bits, point.loss) for point in points])]


def best_within(points: Sequence[Point], bits: float) -> Point:
    """The point of least loss that takes at most so many bits.

    Raises:
        CalibrationError: none does.
    """
    affordable = [point for point in points if point.bits <= bits + 1e-9]
    if not affordable:
        fewest = min(points, key=lambda point: point.bits)
        raise CalibrationError(
            f"None of {len(points)} points that were tried takes at most {bits:g} bits: the fewest were "
            f"{fewest.bits:.3g}. Allow more with --bits, or more points with --tries."
        )
    return min(affordable, key=lambda point: (point.loss, point.bits))
