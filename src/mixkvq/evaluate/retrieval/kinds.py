"""What is hidden in a text, and what is asked about it.

A kind takes a source of randomness, the depth of what is asked for, and the text, from which names and numbers have to
differ: what a question asks for stands in the text once.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

#: Of every number.
DIGITS = 6
#: Needles of a text with several, the one asked for included.
NEEDLES = 4
#: Chains of variables, the one asked for included; variables of each; letters of a name.
CHAINS, LINKS, LETTERS = 3, 5, 4

ADJECTIVES = ["amber", "brave", "calm", "distant", "early", "faint", "golden", "hollow", "icy", "jolly", "lucid"]
NOUNS = ["anchor", "bridge", "cellar", "desert", "falcon", "garden", "harbour", "island", "lantern", "meadow", "violin"]


@dataclass(frozen=True)
class Hidden:
    """Lines to hide in a text, and the question.

    Attributes:
        lines: their places, as the share of the text that comes before, and words; those of one place keep their order.
        intro: what the model reads before the text.
        question: what it reads after the text.
        start: how its answer is begun for it, so that what follows is the answer and not a manner of speaking.
        answer: the rest of the right answer.
        wanted: the words of the right answer that count.
    """

    lines: tuple[tuple[float, str], ...]
    intro: str
    question: str
    start: str
    answer: str
    wanted: tuple[str, ...]


def needle(rng: Random, depth: float, text: str) -> Hidden:
    """One sentence with a key and a number."""
    return _needles(rng, depth, text, 1)


def needles(rng: Random, depth: float, text: str) -> Hidden:
    """Several such sentences with keys of their own, one of which is asked for; the others are anywhere."""
    return _needles(rng, depth, text, NEEDLES)


def _needles(rng: Random, depth: float, text: str, count: int) -> Hidden:
    keys = _new_words(lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", count, text)
    numbers = _new_words(lambda: _number(rng), count, text)
    places = [depth, *(rng.random() for _ in range(count - 1))]
    hidden = zip(places, keys, numbers, strict=True)
    key, number = keys[0], numbers[0]
    return Hidden(
        lines=tuple((place, f"The special number for the {key} is: {number}.") for place, key, number in hidden),
        intro="Special numbers are hidden in the following text. Memorize them: I will ask for one of them afterwards.",
        question=f"What is the special number for the {key} mentioned in the text above?",
        start=f"The special number for the {key} mentioned in the text is",
        answer=f" {number}",
        wanted=(number,),
    )


def variables(rng: Random, depth: float, text: str) -> Hidden:
    """Variable tracking in the manner of RULER: chains of assignments, and all names with one chain's number are asked
    for. The number stands at the depth, and the other links are spread from there to the end; the links of the other
    chains are anywhere.
    """
    names = _new_words(lambda: "".join(rng.choices(string.ascii_uppercase, k=LETTERS)), CHAINS * LINKS, text)
    numbers = _new_words(lambda: _number(rng), CHAINS, text)
    chains = [names[start : start + LINKS] for start in range(0, len(names), LINKS)]
    places = [[depth + (1 - depth) * link / LINKS for link in range(LINKS)]]
    places += [sorted(rng.random() for _ in range(LINKS)) for _ in range(CHAINS - 1)]
    asked, number = chains[0], numbers[0]
    return Hidden(
        lines=tuple(line for chain in zip(places, numbers, chains, strict=True) for line in _assignments(*chain)),
        intro="Variables are assigned in the following text, in lines that begin with VAR. Memorize and track them.",
        question=f"Find all {LINKS} variables that are assigned the value {number} in the text above, directly or "
        "through other variables. Write their names with commas between them.",
        start=f"The {LINKS} variables that are assigned the value {number} in the text above are",
        answer=f" {', '.join(asked)}",
        wanted=tuple(asked),
    )


def _assignments(places: Sequence[float], number: str, names: Sequence[str]) -> list[tuple[float, str]]:
    """A chain's lines: the first name gets the number, every other one the name before it."""
    values = [number, *names[:-1]]
    return [(place, f"VAR {name} = {value}") for place, name, value in zip(places, names, values, strict=True)]


#: Kinds by the name that is typed.
KINDS: dict[str, Callable[[Random, float, str], Hidden]] = {
    "needle": needle,
    "needles": needles,
    "variables": variables,
}


def _number(rng: Random) -> str:
    return str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _new_words(draw: Callable[[], str], count: int, text: str) -> list[str]:
    """Draws that differ, and do not stand in the text."""
    words: list[str] = []
    while len(words) < count:
        word = draw()
        if word not in words and word not in text:
            words.append(word)
    return words
