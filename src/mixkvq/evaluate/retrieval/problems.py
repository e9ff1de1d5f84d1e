"""Problems of an exact length and depth, made from their names (and the text) alone: the same for every cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerBase

from mixkvq.evaluate.errors import EvaluationError
from mixkvq.evaluate.retrieval.kinds import KINDS
from mixkvq.evaluate.retrieval.prompts import PromptWriter, fitting
from mixkvq.evaluate.texts import TextError, read_text

#: Tokens that a model may write beyond the right answer.
SPARE = 8
#: No tokenizer in use makes longer tokens on average, so that so many characters for each of them are enough text.
MOST_CHARACTERS = 8
#: Parts of a text that are tried for a prompt of an exact length; nine times in ten the first has one.
TRIES = 20


@dataclass(frozen=True)
class RetrievalProblem:
    """A prompt, and what is to be found.

    Attributes:
        name: kind, length, depth and number.
        kind: a key of :data:`.kinds.KINDS`.
        length: tokens of the prompt and of the room for an answer together, so that a model's own limit can be asked
            for. The room is the same for all problems of a kind, and so are their prompts.
        depth: share of the text, in characters, that comes before what is asked for, to a word.
        tokens: of the prompt, in the chat template, with the beginning of the answer.
        context: how many of them come before the question.
        answer: tokens of the rest of the right answer.
        wanted: the words of it that count.
    """

    name: str
    kind: str
    length: int
    depth: float
    tokens: list[int]
    context: int
    answer: list[int]
    wanted: tuple[str, ...]


def depths(count: int) -> list[float]:
    """So many depths, from the start of a text to its end; a single one is the middle."""
    return [0.5] if count == 1 else [number / (count - 1) for number in range(count)]


class Haystack:
    """A text to hide things in.

    Args:
        tokenizer: with a chat template.
        path: of the text; None is the built-in one, which is repeated where it is too short.

    Raises:
        TextError: the text cannot be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str | Path | None = None) -> None:
        self.tokenizer, self.path = tokenizer, path
        self.text = read_text(path)

    def problems(self, kind: str, length: int, depth: float, count: int) -> list[RetrievalProblem]:
        """The problems of a kind, length and depth.

        Args:
            length, depth: as in :class:`RetrievalProblem`.

        Raises:
            ChatTemplateError: the model has no chat template.
            EvaluationError: the kind does not exist, or the length leaves no room for it.
            TextError: the text is too short.
        """
        check_kind(kind)
        text = self.text
        while self.path is None and len(text) < MOST_CHARACTERS * length:
            text = f"{text}\n\n{text}"
        return [self._problem(kind, length, depth, number, text) for number in range(count)]

    def _problem(self, kind: str, length: int, depth: float, number: int, text: str) -> RetrievalProblem:
        name = f"{kind}/{length}/{depth:.3f}/{number}"
        rng = Random(name)
        hidden = KINDS[kind](rng, depth, text)
        # As many tokens as the answer has characters are room for it with any tokenizer.
        room = len(hidden.answer) + SPARE
        for attempt in range(TRIES):
            writer = PromptWriter(self.tokenizer, hidden, _turned(text, rng))
            characters = fitting(writer.size, length - room, len(text))
            if characters is not None:
                tokens, context = writer.tokens(characters), writer.context(characters)
                return RetrievalProblem(name, kind, length, depth, tokens, context, writer.answer, hidden.wanted)
            if attempt == 0:
                self._check(writer, kind, length, room)
        raise EvaluationError(
            f"No part of the text makes a prompt of exactly --length {length} with this tokenizer. Give another text "
            "with --text, or a length that is a little different."
        )

    def _check(self, writer: PromptWriter, kind: str, length: int, room: int) -> None:
        """Complain about a length that no part of the text could give."""
        empty = writer.size(0) + room
        if empty > length:
            raise EvaluationError(
                f"--length {length} is too short for --kind {kind}: the question, what is hidden and the answer take "
                f"{empty} tokens with this model, and text comes on top. Ask for more."
            )
        if writer.size(len(writer.text)) + room < length:
            tokens = len(self.tokenizer(self.text)["input_ids"])
            raise TextError(
                f"The text '{self.path}' has {tokens:,} tokens, and --length {length} takes {length - empty:,} of them "
                f"for --kind {kind}: give a longer text, or a smaller --length."
            )


def check_kind(kind: str) -> None:
    """Complain about a kind that does not exist.

    Raises:
        EvaluationError: the message lists those that do.
    """
    if kind not in KINDS:
        raise EvaluationError(f"There is no kind '{kind}'. Known: {', '.join(KINDS)}.")


def _turned(text: str, rng: Random) -> str:
    """The text begun at the start of any of its lines, and gone on with from its own beginning."""
    start = text.find("\n", rng.randrange(len(text) + 1)) + 1
    return f"{text[start:]}\n\n{text[:start]}"
