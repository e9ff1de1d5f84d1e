"""Generated problems (:mod:`mixkvq.evaluate.problems`), for a model that was trained to solve them step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mixkvq.evaluate.errors import EvaluationError
from mixkvq.evaluate.problems import FAMILIES, MAX_CHAIN, MIN_CHAIN, Problem, final_answer, problem_set
from mixkvq.evaluate.tasks.base import Question, Task

#: Tokens that an answer may have beyond the right chain: a share of it, and some.
SPARE_SHARE, SPARE_TOKENS = 0.1, 64


class Reasoner(Task):
    """The first problems of the split ``test``, families in turn.

    Args:
        count: problems.
        families: of :data:`mixkvq.evaluate.problems.FAMILIES`; all of them if none is given.
        longest: tokens of the longest chains, about.

    Raises:
        EvaluationError: a family that does not exist, no problems, or chains too short for any problem.
    """

    name = "reasoner"

    def __init__(self, count: int, *, families: Sequence[str] = (), longest: int = MAX_CHAIN) -> None:
        unknown = [family for family in families if family not in FAMILIES]
        if unknown:
            raise EvaluationError(f"There is no family '{unknown[0]}'. Known: {', '.join(FAMILIES)}.")
        if count < 1:
            raise EvaluationError(f"{count} problems: ask for at least one.")
        if longest < MIN_CHAIN:
            raise EvaluationError(f"Chains of up to {longest} tokens: the shortest ones take {MIN_CHAIN}.")
        problems = problem_set(count, families=tuple(dict.fromkeys(families)) or tuple(FAMILIES), longest=longest)
        ending = "" if longest == MAX_CHAIN else f"/{longest}"
        super().__init__([_question(problem, ending) for problem in problems])

    def grade(self, question: Question, text: str) -> bool:
        """Whether what stands behind the last ``Answer:`` is right."""
        return final_answer(text) == question.right

    def room(self, chain_tokens: int | None) -> int:
        """The right chain's length, a tenth, and 64."""
        assert chain_tokens is not None
        return chain_tokens + math.ceil(SPARE_SHARE * chain_tokens) + SPARE_TOKENS


def _question(problem: Problem, ending: str) -> Question:
    return Question(problem.name + ending, problem.prompt, problem.answer, problem.family, problem.chain)
