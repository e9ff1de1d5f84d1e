"""Measurements that survive an interruption: trials in Optuna's storage."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixkvq.calibrate.errors import MISSING, CalibrationError
from mixkvq.config import MixKVQConfig


def key_of(part: str, config: MixKVQConfig) -> str:
    """A key of :meth:`Trials.once` for what a configuration does on some part of the data."""
    return f"{part} {hashlib.sha256(config.to_json().encode()).hexdigest()[:16]}"


class Trials:
    """An Optuna study, in a journal file or in memory.

    Args:
        path: of the journal; None keeps nothing.
        about: everything that the measurements depend on. A journal of other settings is refused.

    Raises:
        CalibrationError: Optuna is missing, or the journal is of something else.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
        except ImportError:
            raise CalibrationError(MISSING) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            with warnings.catch_warnings(action="ignore"):  # of parts of Optuna that it calls experimental
                storage = None
                if path is not None:
                    lock = JournalFileOpenLock(str(path))
                    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
                self.study = optuna.create_study(storage=storage, study_name="mixkvq", load_if_exists=True)
        except (OSError, ValueError, KeyError) as error:
            raise CalibrationError(f"'{path}' cannot be used for trials: {error}") from error
        before = self.study.user_attrs.get("about")
        if before is not None and before != about:
            changed = sorted(key for key in {*before, *about} if before.get(key) != about.get(key))
            raise CalibrationError(
                f"'{path}' holds trials of other settings ({', '.join(changed)}). Give another file, or delete it."
            )
        self.study.set_user_attr("about", about)

    def once(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` returns, for JSON; taken from the storage if it was measured before."""
        from optuna.trial import TrialState

        for done in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if done.user_attrs.get("key") == key:
                return dict(done.user_attrs["result"])
        trial = self.study.ask()
        trial.set_user_attr("key", key)
        result = measure()
        trial.set_user_attr("result", result)
        self.study.tell(trial, 0.0)
        return result
