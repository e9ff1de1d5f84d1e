"""Generated problems that are solved by long chains of exact steps, and look back far while doing so.

Errors of a cache compound in them: a number copied wrong makes everything after it wrong. Problems are made from their
names alone, so that training never meets a problem that a model is judged on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from mixkvq.evaluate.problems.arithmetic import ledger, multiplication, running_arithmetic
from mixkvq.evaluate.problems.base import Problem, final_answer
from mixkvq.evaluate.problems.lookups import assignments, grid_walk, state_machine, table_lookup
from mixkvq.evaluate.problems.sequences import list_operations, swaps

__all__ = ["FAMILIES", "MAX_CHAIN", "MIN_CHAIN", "Problem", "final_answer", "make_problem", "problem_set"]

#: Generators by the family's name: ``(randomness, tokens of the chain) -> (prompt, chain, answer)``.
FAMILIES: dict[str, Callable[[Random, int], tuple[str, str, str]]] = {
    "running-arithmetic": running_arithmetic,
    "assignments": assignments,
    "swaps": swaps,
    "list-operations": list_operations,
    "multiplication": multiplication,
    "state-machine": state_machine,
    "table-lookup": table_lookup,
    "grid-walk": grid_walk,
    "ledger": ledger,
}

#: Tokens of the shortest and the longest chains, about.
MIN_CHAIN, MAX_CHAIN = 100, 1900


def make_problem(family: str, split: str, number: int, *, longest: int = MAX_CHAIN) -> Problem:
    """The problem of that name.

    Args:
        family: a key of :data:`FAMILIES`.
        split: any word; problems of different splits have nothing to do with each other.
        number: counts a split's problems.
        longest: tokens of the longest chains, about. Lengths are spread evenly in their logarithm.
    """
    name = f"{family}/{split}/{number}"
    rng = Random(name if longest == MAX_CHAIN else f"{name}/{longest}")
    tokens = round(math.exp(rng.uniform(math.log(MIN_CHAIN), math.log(longest))))
    prompt, chain, answer = FAMILIES[family](rng, tokens)
    return Problem(name, family, prompt, f"{chain}\nAnswer: {answer}")


def problem_set(
    count: int, *, split: str = "test", families: Sequence[str] = tuple(FAMILIES), longest: int = MAX_CHAIN
) -> list[Problem]:
    """The first ``count`` problems of a split, families in turn."""
    return [make_problem(families[i % len(families)], split, i // len(families), longest=longest) for i in range(count)]
