"""What can go wrong with an evaluation, and packages that only evaluation needs."""

from __future__ import annotations

import importlib
from types import ModuleType


class EvaluationError(ValueError):
    """Questions, files or options that cannot be evaluated, or a package that is missing."""


def needed(package: str) -> ModuleType:
    """Import a package of the extra ``mixkvq[eval]``.

    Raises:
        EvaluationError: it is not installed, or is and cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        # A name that could not be imported from the package is not a package that is missing.
        if isinstance(error, ModuleNotFoundError) and error.name in (package, package.partition(".")[0]):
            raise EvaluationError(
                f'Evaluation takes the "eval" extra ({package} is missing): pip install "mixkvq[eval]".'
            ) from None
        raise EvaluationError(
            f"Evaluation takes {package}, which is installed but could not be imported: {error}. Install what it "
            'misses, or all of it anew: pip install --force-reinstall "mixkvq[eval]".'
        ) from error
