"""What can be wrong with a calibration."""

from mixkvq.config import ConfigError


class CalibrationError(ConfigError):
    """A model, data or goal that cannot be calibrated with."""


#: What to install for the commands of this folder.
MISSING = 'Calibrating takes the "calibrate" extra: pip install "mixkvq[calibrate]".'
