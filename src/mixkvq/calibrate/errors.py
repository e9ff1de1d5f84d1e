"""What can be wrong with a calibration, and packages that only calibration needs."""

from __future__ import annotations

from types import ModuleType

from mixkvq import extras
from mixkvq.config import ConfigError


class CalibrationError(ConfigError):
    """A model, data or goal that cannot be calibrated with."""


def needed(package: str) -> ModuleType:
    """Import a package of the extra ``mixkvq[calibrate]``.

    Raises:
        CalibrationError: it is not installed, or is and cannot be imported; the message says what to install.
    """
    return extras.needed(package, "calibrate", "Calibration", CalibrationError)
