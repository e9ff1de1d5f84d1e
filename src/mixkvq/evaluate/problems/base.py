"""What a problem is."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ANSWER = re.compile(r"Answer:\s*(.*?)\s*(?:\n|$)")


@dataclass(frozen=True)
class Problem:
    """A question whose solution is a long chain of small steps, every one of which can be checked.

    Attributes:
        name: family, split and number; the same name is the same problem everywhere.
        family: which generator it comes from.
        prompt: the question, to be put into a chat template.
        chain: the solution, step by step; its last line is ``Answer: ...``.
    """

    name: str
    family: str
    prompt: str
    chain: str

    @property
    def answer(self) -> str:
        """What stands behind ``Answer:`` in the chain."""
        answer = final_answer(self.chain)
        assert answer is not None
        return answer

    def solved_by(self, text: str) -> bool:
        """Whether a text ends in the right answer."""
        return final_answer(text) == self.answer


def final_answer(text: str) -> str | None:
    """What stands behind the last ``Answer:`` of a text, or None if there is none."""
    found = _ANSWER.findall(text)
    return found[-1] if found else None
