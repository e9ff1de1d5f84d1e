"""Measurements that survive an interruption: trials in Optuna's storage."""

from __future__ import annotations

import hashlib
import json
import os
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


#: What measurements mean; raised whenever they come to mean something else, so that older ones are not taken for them.
MEANING = 2
#: Seconds after which a journal's lock is taken to be left over from a process that was killed. Writing takes far less.
GRACE = 5
#: What becomes of a file that is no journal, here and in Optuna.
UNUSABLE = (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError)


class Trials:
    """Measurements by key, each made once: in memory, or in a journal file of Optuna's.

    Args:
        path: of the journal; None keeps nothing beyond this object, and does not take Optuna.
        about: everything that the measurements depend on, for JSON. A journal of other settings is refused.

    Raises:
        CalibrationError: Optuna is missing, or the journal is of something else.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._study = None
        if path is None:
            return
        self._study = _open(path)
        own = json.loads(json.dumps({**about, "meaning": MEANING}))  # as it comes back
        before = self._study.user_attrs.get("about", own)
        missing = object()
        changed = sorted(key for key in {*before, *own} if before.get(key, missing) != own.get(key, missing))
        if changed:
            raise CalibrationError(
                f"'{path}' holds trials of other settings ({', '.join(changed)}). Give another file, or delete it."
            )
        self._study.set_user_attr("about", own)
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


def check_journal(path: Path | None) -> None:
    """Refuse a file that is there and is no journal, or cannot be one; it is not changed.

    Raises:
        CalibrationError: it holds something else, cannot be read or written, or Optuna is missing.
    """
    if path is None:
        return
    needed("optuna")
    try:
        _whole_lines(path)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("it may not be written")
    except UNUSABLE as error:
        raise CalibrationError(f"'{path}' cannot be used for trials: {error}") from error


def _open(path: Path) -> Study:
    optuna = needed("optuna")
    journal = needed("optuna.storages.journal")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):  # of parts of Optuna that it calls experimental
            lock = journal.JournalFileOpenLock(str(path), grace_period=GRACE)
            _mend(path, lock)
            storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path), lock_obj=lock))
            return optuna.create_study(storage=storage, study_name="mixkvq", load_if_exists=True)
    except UNUSABLE as error:
        raise CalibrationError(f"'{path}' cannot be used for trials: {error}") from error


def _mend(path: Path, lock: Any) -> None:
    """Cut off a last line that was not written to its end, as by a full disk or a lost machine: Optuna would refuse
    the whole journal for it.

    Args:
        lock: Optuna's, as another process may be writing that line.
    """
    lock.acquire()
    try:
        whole = _whole_lines(path)
        if path.exists() and whole < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(whole)
    finally:
        lock.release()


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last line that is whole.

    Raises:
        ValueError: the file is no journal, to which Optuna would append all the same.
    """
    written = path.read_bytes() if path.exists() else b""
    if not written:
        return 0
    first = json.loads(written.partition(b"\n")[0])
    if not isinstance(first, dict) or "op_code" not in first:
        raise ValueError("it is no journal of Optuna's")
    return written.rfind(b"\n") + 1
