"""Training problems that a calibration may be scored on, instead of the KL on text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.calibrate import fingerprint
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.examiner import Examiner
from mixkvq.calibrate.trials import Trials
from mixkvq.evaluate.answers import Settings
from mixkvq.evaluate.runner import Run
from mixkvq.evaluate.tasks import Mathematics, Task
from mixkvq.models import DEFAULT_MODEL

#: Problems that are calibrated on; those of ``mixkvq eval gsm8k`` are to judge on.
PROBLEMS = "gsm8k-train"

DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="A folder with gsm8k_train.jsonl.", show_default="the Hugging Face hub"),
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Answers that are written together.")]
NewTokensOption = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")]


@dataclass(frozen=True)
class Exam:
    """Problems and how they are asked."""

    task: Task
    batch: int
    max_new_tokens: int | None

    def examiner(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        model: str | None,
        dtype: str,
        trials: Trials,
    ) -> Examiner:
        """Asks a model, greedily."""
        settings = Settings(model or DEFAULT_MODEL, None, dtype, self.max_new_tokens, 0.0, 1.0, seed=0)
        return Examiner(Run(network, tokenizer, self.task, settings, batch=self.batch), trials)


def exam(problems: int | None, data_dir: Path | None, batch: int, max_new_tokens: int | None) -> Exam | None:
    """What the options come to; None without problems.

    Raises:
        CalibrationError: there is a folder, but no number of problems.
    """
    if problems is None:
        if data_dir is not None:
            raise CalibrationError("--data-dir has problems: say how many to score the search on with --problems.")
        return None
    return Exam(Mathematics(PROBLEMS, folder=data_dir, count=problems), batch, max_new_tokens)


def about_exam(scored: Exam | None) -> dict[str, Any]:
    """The same for trials and files."""
    if scored is None:
        return {"problems": None}
    return {
        "problems": len(scored.task.questions),
        "questions": fingerprint.of_questions(scored.task),
        "batch": scored.batch,
        "max_new_tokens": scored.max_new_tokens,
    }
