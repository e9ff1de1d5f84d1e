"""What can go wrong with an evaluation, and packages that only evaluation needs."""

from __future__ import annotations

import importlib
from types import ModuleType


class EvaluationError(ValueError):
    """Questions, files or options that cannot be evaluated, or a package that is missing."""


def needed(package: str) -> ModuleType:
    """Import a package of the extra ``mixkvq[eval]``.

    Raises:
        EvaluationError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise EvaluationError(
            f'Evaluation takes the "eval" extra ({package} is missing): pip install "mixkvq[eval]".'
        ) from None
