"""What a model is asked, and how its answers are judged."""

from mixkvq.evaluate.tasks.base import Question, Task
from mixkvq.evaluate.tasks.mathematics import BENCHMARKS, Mathematics
from mixkvq.evaluate.tasks.reasoner import Reasoner

__all__ = ["BENCHMARKS", "Mathematics", "Question", "Reasoner", "Task"]
