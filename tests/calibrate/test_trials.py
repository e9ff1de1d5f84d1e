"""Trials: kept whole through an interruption, refused for anything else, and without Optuna where nothing is kept."""

import sys
import time
from pathlib import Path

import pytest

from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.trials import Trials

ABOUT = {"text": "a", "window": 300}


def kept(path: Path, count: int) -> list[int]:
    """Which of so many measurements are made anew."""
    trials, made = Trials(path, ABOUT), []

    def measure(at: int) -> dict[str, int]:
        made.append(at)
        return {"value": at * at}

    for at in range(count):
        assert trials.once(f"window {at}", lambda at=at: measure(at)) == {"value": at * at}
    return made


@pytest.mark.parametrize("lost", [1, 30, 200, 400])
def test_a_journal_that_was_cut_short_loses_its_last_trial_alone(tmp_path: Path, lost: int):
    journal = tmp_path / "trials"
    assert kept(journal, 6) == [0, 1, 2, 3, 4, 5]
    assert kept(journal, 6) == []
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-lost])
    made = kept(journal, 6)
    assert made in ([], [5], [4, 5])
    assert made[:1] != [4] or lost > 200
    assert kept(journal, 6) == []


@pytest.mark.parametrize(
    "content",
    [
        b"{}\n{}\n",
        b"no journal\n",
        b"\xff\xfe\n",
        b"5\n",
        b"no line",
        b'{"op_code":0',
        b'{"op_code":99}\n',
        b"[" * 10**5,
    ],
)
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path, content: bytes):
    journal = tmp_path / "trials"
    journal.write_bytes(content)
    with pytest.raises(CalibrationError, match="cannot be used for trials"):
        Trials(journal, ABOUT)
    assert journal.read_bytes() == content


def test_trials_of_other_settings_are_refused(tmp_path: Path):
    journal = tmp_path / "trials"
    kept(journal, 1)
    with pytest.raises(CalibrationError, match=r"holds trials of other settings \(text, window\)"):
        Trials(journal, {"text": "b"})
    with pytest.raises(CalibrationError, match=r"of other settings \(problems\)"):
        Trials(journal, {**ABOUT, "problems": None})
    Trials(journal, ABOUT)


def test_trials_that_meant_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = tmp_path / "trials"
    kept(journal, 1)
    monkeypatch.setattr("mixkvq.calibrate.trials.MEANING", 99)
    with pytest.raises(CalibrationError, match=r"of other settings \(meaning\)"):
        Trials(journal, ABOUT)


def test_settings_come_back_as_json_has_them(tmp_path: Path):
    about = {"levels": (0.0, 1.5), "layers": {1: "a"}}
    for _ in range(2):
        Trials(tmp_path / "trials", about)


def test_a_lock_that_was_left_over_holds_nobody_for_long(tmp_path: Path):
    journal = tmp_path / "trials"
    kept(journal, 2)
    (tmp_path / "trials.lock").touch()
    start = time.monotonic()
    assert kept(journal, 3) == [2]
    assert time.monotonic() - start < 15


def test_nothing_is_kept_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    trials = Trials(None, ABOUT)
    assert trials.once("a", lambda: {"value": 1}) == trials.once("a", dict) == {"value": 1}
    with pytest.raises(CalibrationError, match=r'takes the "calibrate" extra \(optuna is missing\): pip install'):
        Trials(tmp_path / "trials", ABOUT)
