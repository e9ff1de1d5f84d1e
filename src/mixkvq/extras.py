"""Packages that only some commands need: imported there, with a message that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def needed(package: str, extra: str, what: str, error_type: type[Exception]) -> ModuleType:
    """Import a package of an extra.

    Args:
        extra: as in ``mixkvq[extra]``.
        what: what takes the package, for the message.
        error_type: to raise if it is not installed, or is and cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        # A name that could not be imported from the package is not a package that is missing.
        if isinstance(error, ModuleNotFoundError) and error.name in (package, package.partition(".")[0]):
            raise error_type(
                f'{what} takes the "{extra}" extra ({package} is missing): pip install "mixkvq[{extra}]".'
            ) from None
        raise error_type(
            f"{what} takes {package}, which is installed but could not be imported: {error}. Install what it "
            f'misses, or all of it anew: pip install --force-reinstall "mixkvq[{extra}]".'
        ) from error
