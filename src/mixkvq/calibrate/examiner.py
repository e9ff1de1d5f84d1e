"""Measuring configurations by how many of a task's questions a model answers right, each once."""

from __future__ import annotations

from collections.abc import Callable

from mixkvq.calibrate.trials import Trials, key_of
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.accuracy import accuracies
from mixkvq.evaluate.answers import AnswerFile
from mixkvq.evaluate.runner import Run


class Examiner:
    """Accuracies of configurations.

    Args:
        run: a task for a model.
        trials: keep what was measured.
    """

    def __init__(self, run: Run, trials: Trials) -> None:
        self.run, self.trials = run, trials

    def __call__(self, config: MixKVQConfig, advance: Callable[[int], None] = lambda _: None) -> float:
        """The share of right answers.

        Args:
            advance: called with how many answers there are.
        """

        def ask() -> dict[str, float]:
            answers = self.run.answers({"": config}, [], AnswerFile(None), lambda _, count: advance(count))
            return {"accuracy": accuracies(answers, [""])[0].accuracy}

        return float(self.trials.once(key_of(self.run.task.name, config), ask)["accuracy"])
