"""What can go wrong with an evaluation, and packages that only evaluation needs."""

from __future__ import annotations

from types import ModuleType

from mixkvq import extras


class EvaluationError(ValueError):
    """Questions, files or options that cannot be evaluated, or a package that is missing."""


def needed(package: str) -> ModuleType:
    """Import a package of the extra ``mixkvq[eval]``.

    Raises:
        EvaluationError: it is not installed, or is and cannot be imported; the message says what to install.
    """
    return extras.needed(package, "eval", "Evaluation", EvaluationError)
