"""A text with hidden lines as a chat model reads it, cut so that the prompt has an exact number of tokens.

The prompt is what the tokenizer makes of the whole text; nothing is put together from tokens. So its length follows
from where the text is cut, and has to be searched for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from mixkvq.evaluate.chains import prompt_tokens
from mixkvq.evaluate.retrieval.kinds import Hidden

#: Characters that a hidden line moves back at most, to stand between words.
LONGEST_WORD = 40
#: Characters of a token, to begin the search with.
USUAL_CHARACTERS = 4
#: Leaps of the search, and characters to either side that are tried one by one after them.
LEAPS, NEARBY = 6, 16


class PromptWriter:
    """Prompts with the same lines hidden in more or less of a text.

    Args:
        tokenizer: with a chat template.
        hidden: what to hide and ask.
        text: where.

    Attributes:
        answer: tokens of the right answer, after its beginning, which is part of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden: Hidden, text: str) -> None:
        self.tokenizer, self.hidden, self.text = tokenizer, hidden, text
        start, whole = (
            tokenizer(words, add_special_tokens=False)["input_ids"]
            for words in (hidden.start, hidden.start + hidden.answer)
        )
        begun = _common(start, whole)
        self.start, self.answer = list(whole[:begun]), list(whole[begun:])

    def tokens(self, characters: int) -> list[int]:
        """The prompt with so many characters of the text."""
        content = f"{self._context(characters)}\n\n{self.hidden.question}"
        return [*prompt_tokens(self.tokenizer, content), *self.start]

    def size(self, characters: int) -> int:
        """Tokens of that prompt."""
        return len(self.tokens(characters))

    def context(self, characters: int) -> int:
        """How many of them come before the question."""
        return _common(self.tokens(characters), prompt_tokens(self.tokenizer, self._context(characters)))

    def _context(self, characters: int) -> str:
        return f"{self.hidden.intro}\n\n{hide(self.text[:characters], self.hidden.lines)}"


def hide(text: str, lines: Sequence[tuple[float, str]]) -> str:
    """A text with lines put in between its words.

    Args:
        lines: each with the share of the text, in characters, that comes before it.
    """
    parts, before = [], 0
    for place, line in sorted(lines, key=lambda item: item[0]):
        at = _word_start(text, round(place * len(text)))
        parts += [text[before:at].strip(), line]
        before = at
    return "\n".join(part for part in [*parts, text[before:].strip()] if part)


def fitting(size: Callable[[int], int], wanted: int, most: int) -> int | None:
    """Characters, at most ``most``, for which ``size`` is exactly ``wanted`` tokens; None if none are found.

    Tokens grow with characters by and large, but now and then by two at once, or shrink: a word that is whole may take
    fewer tokens than its beginning, and hidden lines move from word to word.
    """
    near, found = _leap(size, wanted, most)
    if abs(wanted - found) > NEARBY:
        return None
    candidates = (near + step * sign for step in range(NEARBY) for sign in (1, -1))
    return next((at for at in candidates if 0 <= at <= most and size(at) == wanted), None)


def _leap(size: Callable[[int], int], wanted: int, most: int) -> tuple[int, int]:
    """About as many characters, by what those before came to, and their tokens."""
    empty = found = size(0)
    at = 0
    for _ in range(LEAPS):
        rate = at / (found - empty) if found > empty else USUAL_CHARACTERS
        to = min(max(at + round(rate * (wanted - found)), 0), most)
        if to == at:
            break
        at, found = to, size(to)
        if abs(wanted - found) <= 1:
            break
    return at, found


def _word_start(text: str, at: int) -> int:
    """The start of the word at a place; the place itself if words are not told apart by spaces."""
    if at == len(text):
        return at
    starts = range(at, max(at - LONGEST_WORD, 0), -1)
    return next((start for start in starts if text[start - 1].isspace()), at)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
