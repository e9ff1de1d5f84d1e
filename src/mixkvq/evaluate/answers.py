"""Answers, and the file that keeps them: one JSON object a line, so that an interrupted run can go on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.errors import EvaluationError
from mixkvq.evaluate.tasks import Task

#: What tells an answer from all others: cache, question, sample.
Key = tuple[str, str, int]
#: What every line of a file begins with.
START = '{"task": "'


@dataclass(frozen=True)
class Settings:
    """What has to be the same for answers of a task to be compared.

    Attributes:
        model: its name.
        adapter: name and fingerprint of an adapter that was merged into it, or None.
        dtype: of the model.
        max_new_tokens: what the user asked for; None leaves it to the task.
        temperature, top_p: of the sampling.
        seed: of the sampling.
    """

    model: str
    adapter: str | None
    dtype: str
    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """One answer with one cache.

    Attributes:
        task, question, sample: what was asked, and which answer of several it is, counted from 0.
        cache: as it was typed.
        config: the fields of the cache's configuration that are not as :class:`MixKVQConfig` has them.
        text: what was written, without the end token.
        new_tokens: how many tokens that took, the end token included.
        finished: whether it came to an end.
        correct: whether it did and is right.
        right: the right answer.
        family: of the question.
        chain_tokens: of the question's chain, or None.
        exact: whether the text is that chain; None without one.
        bits: honest bits per packed element of the cache, its batch together; None if nothing was packed.
        settings: what else decides the answer.
    """

    task: str
    question: str
    sample: int
    cache: str
    config: dict[str, Any]
    text: str
    new_tokens: int
    finished: bool
    correct: bool
    right: str
    family: str
    chain_tokens: int | None
    exact: bool | None
    bits: float | None
    settings: Settings

    @property
    def key(self) -> Key:
        """Cache, question and sample."""
        return self.cache, self.question, self.sample

    def line(self) -> str:
        """One line of JSON."""
        fields = asdict(self)
        settings = fields.pop("settings")
        return json.dumps({**fields, **settings}, ensure_ascii=False) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Answer:
        """From :meth:`line`; ValueError or TypeError if it is none."""
        fields = json.loads(line)
        names = [field.name for field in dataclasses.fields(Settings)]
        if not isinstance(fields, dict) or not set(names) <= set(fields):
            raise ValueError("fields are missing")
        return cls(settings=Settings(**{name: fields.pop(name) for name in names}), **fields)


def config_fields(config: MixKVQConfig) -> dict[str, Any]:
    """The fields that are not as :class:`MixKVQConfig` has them: what a preset's name stands for."""
    given = config.as_dict()
    return {field: given[field] for field in config.changed}


def _is_cut(rest: str) -> bool:
    """Whether a line without an end is one of ours that was not written in full, but perhaps for its newline."""
    try:
        Answer.of_line(rest)
    except json.JSONDecodeError:
        return rest.startswith(START) or START.startswith(rest)
    except (ValueError, TypeError):
        return False
    return True


class AnswerFile:
    """A file of answers to append to.

    Attributes:
        path: of the file; None keeps nothing.
        answers: those it held when it was opened.
        dropped: whether its last line was not whole. It is no answer, and goes once another one is written.

    Raises:
        EvaluationError: it cannot be read, or holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.answers: list[Answer] = []
        self.dropped = False
        self._whole = 0
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EvaluationError(f"Cannot read the answers '{path}': {error}") from error
        whole, _, rest = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                self.answers.append(Answer.of_line(line.decode()))
            except (ValueError, TypeError) as error:
                raise EvaluationError(
                    f"Line {number} of '{path}' is not an answer that mixkvq eval wrote: {error}. Give another file "
                    "with --answers, or delete the line."
                ) from error
        self.dropped, self._whole = bool(rest), len(content) - len(rest)
        if rest and not _is_cut(rest.decode(errors="replace")):  # it may end within a character
            raise EvaluationError(
                f"The last line of '{path}' has no end, and is not one that mixkvq eval began to write. Give another "
                "file with --answers, or delete the line."
            )

    def append(self, answers: Iterable[Answer]) -> None:
        """Write answers at the end, at once."""
        if self.path is None:
            return
        if self.dropped:
            # Not when it is read: who only looks at a file must not change it.
            os.truncate(self.path, self._whole)
            self.dropped = False
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(answer.line() for answer in answers))

    def of(self, task: Task, caches: Mapping[str, MixKVQConfig], settings: Settings) -> list[Answer]:
        """The answers that a run need not write again.

        Raises:
            EvaluationError: the file's answers to this task were written with other settings, by a cache that had the
                same name, or to a question that had.
        """
        questions = {question.name: question for question in task.questions}
        kept: dict[Key, Answer] = {}
        for answer in self.answers:
            if answer.task != task.name:
                continue
            self._compare(asdict(answer.settings), asdict(settings), "options", answer)
            if answer.cache not in caches or answer.question not in questions or answer.sample >= task.samples:
                continue
            self._compare(answer.config, config_fields(caches[answer.cache]), f"cache '{answer.cache}'", answer)
            self._compare({"right": answer.right}, {"right": questions[answer.question].right}, "questions", answer)
            kept[answer.key] = answer
        return list(kept.values())

    def _compare(self, there: Mapping[str, Any], now: Mapping[str, Any], what: str, answer: Answer) -> None:
        for name in [*there, *now]:
            if there.get(name) != now.get(name):
                raise EvaluationError(
                    f"The answers in '{self.path}' cannot be gone on with, as the {what} were others: {name} was "
                    f"{there.get(name)!r} for {answer.task} {answer.question}, and is {now.get(name)!r} now. Give "
                    "another file with --answers, or what that run was given."
                )
