"""What a question and a task are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        name: tells it from the others of its task.
        prompt: what the model is asked, to be put into a chat template.
        right: the right answer.
        family: the kind of question, or nothing.
        chain: the one text that is right as a whole, if there is one.
    """

    name: str
    prompt: str
    right: str
    family: str = ""
    chain: str | None = None


class Task(ABC):
    """Questions, how often each is asked, and what is right.

    Args:
        questions: at least one, with names that differ.
        samples: answers to each question.
        temperature: of the sampling; 0 takes the likeliest token.
        top_p: share of the likeliest tokens to sample from.

    Attributes:
        name: as it is typed, and as it stands in files.
    """

    name: str

    def __init__(
        self, questions: Sequence[Question], *, samples: int = 1, temperature: float = 0.0, top_p: float = 1.0
    ) -> None:
        self.questions = questions
        self.samples = samples
        self.temperature = temperature
        self.top_p = top_p

    @abstractmethod
    def grade(self, question: Question, text: str) -> bool:
        """Whether an answer that came to its end is right."""

    @abstractmethod
    def room(self, chain_tokens: int | None) -> int:
        """New tokens to allow for an answer, unless the user says it.

        Args:
            chain_tokens: of the question's chain, if it has one.
        """
