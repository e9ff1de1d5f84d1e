"""Public sets of mathematical problems with short answers, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixkvq.evaluate.errors import EvaluationError, needed
from mixkvq.evaluate.tasks.base import Question, Task

#: What every question ends in: the wording that reasoning models were trained with.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
#: Fields that a problem's text stands in.
PROBLEM_FIELDS = ("question", "problem")


@dataclass(frozen=True)
class Benchmark:
    """Where a set of problems is.

    Attributes:
        summary: what it is.
        file: its file in a folder, JSON lines.
        hub, subset, split: its name on the hub.
        new_tokens: to allow for an answer.
        mark: the final answer stands behind this in the answers; nothing if that is all they are.
    """

    summary: str
    file: str
    hub: str
    subset: str | None
    split: str
    new_tokens: int
    mark: str = ""


BENCHMARKS = {
    "gsm8k": Benchmark(
        "1,319 word problems of primary school", "gsm8k_test.jsonl", "openai/gsm8k", "main", "test", 2048, "####"
    ),
    "gsm8k-train": Benchmark(
        "7,473 more of them, to calibrate on", "gsm8k_train.jsonl", "openai/gsm8k", "main", "train", 2048, "####"
    ),
    "math-500": Benchmark(
        "500 problems of competitions", "math500_test.jsonl", "HuggingFaceH4/MATH-500", None, "test", 8192
    ),
    "aime-2024": Benchmark(
        "30 problems of a hard competition", "aime_2024.jsonl", "HuggingFaceH4/aime_2024", None, "train", 32768
    ),
    "aime-2025": Benchmark(
        "30 problems of a hard competition", "aime_2025.jsonl", "math-ai/aime25", None, "test", 32768
    ),
}


class Mathematics(Task):
    """One of :data:`BENCHMARKS`, checked by the library math-verify.

    Args:
        name: which one.
        folder: with its file; None loads it from the hub.
        count: problems, the first ones; None takes all.
        sampling: ``samples``, ``temperature`` and ``top_p`` of :class:`Task`.

    Raises:
        EvaluationError: no file, no hub, a line that is no problem, or math-verify is not installed.
    """

    def __init__(self, name: str, *, folder: Path | None = None, count: int | None = None, **sampling: Any) -> None:
        self.name, self.benchmark = name, BENCHMARKS[name]
        needed("math_verify")
        if count is not None and count < 1:
            raise EvaluationError(f"{count} problems: ask for at least one.")
        rows = _of_folder(folder, self.benchmark) if folder is not None else _of_hub(self.benchmark)
        questions = [_question(f"{name}/{at}", row, self.benchmark, where) for at, (where, row) in enumerate(rows)]
        if not questions:
            raise EvaluationError(f"There are no problems in '{self.benchmark.file}'.")
        super().__init__(questions[:count], **sampling)

    def grade(self, question: Question, text: str) -> bool:
        """Whether the text's last boxed answer, or without one its last number, equals the right one."""
        from math_verify import parse, verify

        return bool(verify(parse(f"\\boxed{{{question.right}}}"), parse(text)))

    def room(self, chain_tokens: int | None) -> int:
        """What the set allows."""
        return self.benchmark.new_tokens


def _question(name: str, row: Mapping[str, Any], benchmark: Benchmark, where: str) -> Question:
    text = next((row[field] for field in PROBLEM_FIELDS if isinstance(row.get(field), str)), None)
    answer = _answer(row.get("answer", ""), benchmark, where)
    if text is None or not answer:
        raise EvaluationError(
            f"{where} is no problem: it takes an 'answer' and a '{PROBLEM_FIELDS[0]}' (or '{PROBLEM_FIELDS[1]}'), and "
            f"has {', '.join(sorted(row)) or 'nothing'}."
        )
    return Question(name, f"{text.strip()}\n\n{INSTRUCTION}", answer, str(row.get("subject", "")))


def _answer(value: Any, benchmark: Benchmark, where: str) -> str:
    """The final answer, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise EvaluationError(
            f"{where} is no problem: its 'answer' is {json.dumps(value, default=repr)}, and has to be text or a "
            "number. Mend or delete that line."
        )
    text = str(value)
    return (text.rpartition(benchmark.mark)[2] if benchmark.mark else text).strip()


def _of_folder(folder: Path, benchmark: Benchmark) -> list[tuple[str, dict[str, Any]]]:
    """Rows of the file, each with where it stands."""
    path = folder / benchmark.file
    if not path.is_file():
        raise EvaluationError(
            f"There is no {benchmark.file} in '{folder}'. Give a folder that has it with --data-dir, or leave that out "
            f"to load {benchmark.hub} from the Hugging Face hub."
        )
    # splitlines() would also split at characters that JSON allows within a text, such as U+2028.
    lines = enumerate(_text(path).split("\n"), 1)
    return [(f"Line {number} of '{path}'", _row(line, path, number)) for number, line in lines if line.strip()]


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise EvaluationError(
            f"Line {number} of '{path}' is not UTF-8: {error}. Convert the file to UTF-8, for example with iconv."
        ) from error


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"Line {number} of '{path}' is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise EvaluationError(f"Line {number} of '{path}' is not an object of fields.")
    return row


def _of_hub(benchmark: Benchmark) -> Sequence[tuple[str, Mapping[str, Any]]]:
    datasets = needed("datasets")
    try:
        rows = datasets.load_dataset(benchmark.hub, benchmark.subset, split=benchmark.split)
    except Exception as error:  # whatever the network, the hub and its client make of it
        raise EvaluationError(
            f"Could not load {benchmark.hub} from the Hugging Face hub: {str(error).strip() or type(error).__name__}. "
            f"Without a network, give a folder that has {benchmark.file} with --data-dir."
        ) from error
    return [(f"Row {number} of {benchmark.hub}", row) for number, row in enumerate(rows)]
