"""Measurements that survive an interruption: trials in Optuna's storage."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixkvq.calibrate.errors import CalibrationError, needed
from mixkvq.config import MixKVQConfig

if TYPE_CHECKING:
    from optuna import Study


def key_of(part: str, config: MixKVQConfig) -> str:
    """A key of :meth:`Trials.once` for what a configuration does on some part of the data."""
    return f"{part} {hashlib.sha256(config.to_json().encode()).hexdigest()[:16]}"


class Trials:
    """Measurements by key, each made once: in memory, or in a journal file of Optuna's.

    Args:
        path: of the journal; None keeps nothing beyond this object, and does not take Optuna.
        about: everything that the measurements depend on. A journal of other settings is refused.

    Raises:
        CalibrationError: Optuna is missing, or the journal is of something else.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._study = None
        if path is None:
            return
        self._study = _open(path)
        before = self._study.user_attrs.get("about")
        if before is not None and before != about:
            changed = sorted(key for key in {*before, *about} if before.get(key) != about.get(key))
            raise CalibrationError(
                f"'{path}' holds trials of other settings ({', '.join(changed)}). Give another file, or delete it."
            )
        self._study.set_user_attr("about", about)
        for done in self._study.get_trials(deepcopy=False):
            if {"key", "result"} <= set(done.user_attrs):
                self._known[done.user_attrs["key"]] = done.user_attrs["result"]

    def once(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` returns, for JSON; taken from the storage if it was measured before."""
        if key in self._known:
            return dict(self._known[key])
        result = measure()
        if self._study is not None:
            trial = self._study.ask()
            trial.set_user_attr("key", key)
            trial.set_user_attr("result", result)
            self._study.tell(trial, 0.0)
        self._known[key] = result
        return dict(result)


def _open(path: Path) -> Study:
    optuna = needed("optuna")
    journal = needed("optuna.storages.journal")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        _mend(path)
        with warnings.catch_warnings(action="ignore"):  # of parts of Optuna that it calls experimental
            backend = journal.JournalFileBackend(str(path), lock_obj=journal.JournalFileOpenLock(str(path)))
            storage = optuna.storages.JournalStorage(backend)
            return optuna.create_study(storage=storage, study_name="mixkvq", load_if_exists=True)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(f"'{path}' cannot be used for trials: {error}") from error


def _mend(path: Path) -> None:
    """Cut off a last line that was not written to its end, as by a full disk or a lost machine: Optuna would refuse
    the whole journal for it.

    Raises:
        ValueError: the file is something else.
    """
    written = path.read_bytes() if path.exists() else b""
    if not written:
        return
    first = json.loads(written.partition(b"\n")[0])
    if not isinstance(first, dict) or "op_code" not in first:  # Optuna would append to what it cannot read
        raise ValueError("it is no journal of Optuna's")
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        with path.open("r+b") as file:
            file.truncate(whole)
