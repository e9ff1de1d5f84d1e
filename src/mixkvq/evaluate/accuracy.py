"""What answers come to: shares with intervals, and paired comparisons with full precision."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixkvq.bench import BF16
from mixkvq.evaluate.answers import Answer
from mixkvq.evaluate.likelihood import LENGTHS
from mixkvq.evaluate.statistics import paired_p, wilson

#: Names of the lengths of chains, between the bounds in LENGTHS.
LENGTH_NAMES = (
    f"up to {LENGTHS[0]}",
    *(f"{low + 1} to {high}" for low, high in itertools.pairwise(LENGTHS)),
    f"over {LENGTHS[-1]}",
)


@dataclass(frozen=True)
class Difference:
    """A cache against ``bf16``, question by question.

    Attributes:
        points: accuracy minus that of ``bf16``, in percentage points.
        better, worse: questions that the cache answers right more often, and less often.
        p: McNemar's exact p-value; with several samples, that of the sign test over questions.
    """

    points: float
    better: int
    worse: int
    p: float


@dataclass(frozen=True)
class Group:
    """A part of the questions: how many there are, and the share of right answers."""

    questions: int
    accuracy: float


@dataclass(frozen=True)
class Accuracy:
    """A row of the table: all answers with one cache.

    Attributes:
        cache: as it was given.
        questions, samples: how many were asked, and answers to each.
        accuracy: share of right answers, mean over questions.
        low, high: 95% interval of it over questions (Wilson).
        difference: against ``bf16``; None if that is not among the caches, or this is it.
        exact: share of answers that are the right chain, word for word; None where there is none.
        cut_off: share of answers that did not come to an end.
        new_tokens: mean of an answer.
        bits: honest bits per packed element, mean over answers; None if nothing was packed.
        families, lengths: parts of the questions, by family and by length of the right chain in tokens.
    """

    cache: str
    questions: int
    samples: int
    accuracy: float
    low: float
    high: float
    difference: Difference | None
    exact: float | None
    cut_off: float
    new_tokens: float
    bits: float | None
    families: dict[str, Group]
    lengths: dict[str, Group]

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, for JSON."""
        return asdict(self)


def accuracies(answers: Sequence[Answer], caches: Iterable[str]) -> list[Accuracy]:
    """A row for each cache, in the order given.

    Args:
        answers: to the same questions with every cache, at least one.
    """
    by_cache: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_cache[answer.cache].append(answer)
    reference = _shares(by_cache[BF16]) if BF16 in by_cache else None
    return [_row(name, by_cache[name], reference if name != BF16 else None) for name in caches]


def _row(cache: str, answers: Sequence[Answer], reference: dict[str, float] | None) -> Accuracy:
    shares = _shares(answers)
    right = math.fsum(shares.values())
    exact = [answer.exact for answer in answers if answer.exact is not None]
    bits = [answer.bits for answer in answers if answer.bits is not None]
    low, high = wilson(right, len(shares))
    return Accuracy(
        cache=cache,
        questions=len(shares),
        samples=len(answers) // len(shares),
        accuracy=right / len(shares),
        low=low,
        high=high,
        difference=None if reference is None else compare(shares, reference),
        exact=_mean(exact),
        cut_off=sum(not answer.finished for answer in answers) / len(answers),
        new_tokens=sum(answer.new_tokens for answer in answers) / len(answers),
        bits=_mean(bits),
        families=_groups(answers, lambda answer: answer.family, sorted({answer.family for answer in answers})),
        lengths=_groups(answers, length_name, LENGTH_NAMES),
    )


def compare(shares: dict[str, float], reference: dict[str, float]) -> Difference:
    """Shares of right answers by question against those of full precision."""
    better = sum(share > reference[question] for question, share in shares.items())
    worse = sum(share < reference[question] for question, share in shares.items())
    points = 100 * math.fsum(share - reference[question] for question, share in shares.items()) / len(shares)
    return Difference(points, better, worse, paired_p(better, worse))


def length_name(answer: Answer) -> str:
    """How long the right chain is, in words; nothing where there is none."""
    if answer.chain_tokens is None:
        return ""
    return LENGTH_NAMES[sum(answer.chain_tokens > bound for bound in LENGTHS)]


def _shares(answers: Iterable[Answer]) -> dict[str, float]:
    """Share of right answers by question."""
    by_question: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        by_question[answer.question].append(answer.correct)
    return {question: sum(right) / len(right) for question, right in by_question.items()}


def _groups(answers: Sequence[Answer], name: Callable[[Answer], str], order: Sequence[str]) -> dict[str, Group]:
    """The parts that have a name and answers, in that order."""
    parts: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        parts[name(answer)].append(answer)
    shares = {part: _shares(parts[part]).values() for part in order if part and part in parts}
    return {part: Group(len(each), math.fsum(each) / len(each)) for part, each in shares.items()}


def _mean(numbers: Sequence[float]) -> float | None:
    return math.fsum(numbers) / len(numbers) if numbers else None
