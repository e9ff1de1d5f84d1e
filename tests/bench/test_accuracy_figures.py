"""Pictures of accuracy hold the numbers of the rows that they are drawn from."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from mixkvq.report.accuracy import accuracy_figures
from mixkvq.report.plots import plot_files


def row(cache: str, accuracy: float, bits: float | None, **more: object) -> dict:
    lengths = {
        "up to 300": {"questions": 20, "accuracy": min(1.0, accuracy + 0.1)},
        "over 800": {"questions": 20, "accuracy": accuracy - 0.1},
    }
    found = {"cache": cache, "task": "reasoner", "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.02}
    return {**found, "bits": bits, "questions": 40, "lengths": lengths, "device": "a GPU", "model": "m", **more}


ROWS = [row("bf16", 0.95, 16.0), row("default", 0.9, 2.7), row("kivi-2", 0.2, 3.0)]
NATS = [
    {"cache": name, "chains": {"nats_per_chain": nats}, "device": "a CPU", "model": "m"}
    for name, nats in (("default", 0.3), ("kivi-2", 90))
]


def test_accuracy_over_bits_and_by_length():
    figures = accuracy_figures(ROWS)
    assert list(figures) == ["accuracy-reasoner"]
    over_bits, by_length = figures["accuracy-reasoner"].axes
    points = {bar.get_label(): bar.lines[0].get_xydata()[0].tolist() for bar in over_bits.containers}
    assert points == {"default": [2.7, 0.9], "kivi-2": [3.0, 0.2]}
    lines = {line.get_label(): line.get_ydata() for line in by_length.lines}
    assert lines["default"] == pytest.approx([1.0, 0.8])
    assert [tick.get_text() for tick in by_length.get_xticklabels()] == ["up to 300", "over 800"]


def test_questions_without_chains_have_one_panel():
    figures = accuracy_figures([{**one, "lengths": {}, "task": "gsm8k"} for one in ROWS])
    assert len(figures["accuracy-gsm8k"].axes) == 1


def test_accuracy_by_likelihood_takes_both_measures():
    assert "likelihood-reasoner" not in accuracy_figures([*ROWS, NATS[0]])
    (axes,) = accuracy_figures([*ROWS, *NATS])["likelihood-reasoner"].axes
    points = sorted(bar.lines[0].get_xydata()[0].tolist() for bar in axes.containers)
    assert points == [[0.3, 0.9], [90, 0.2]]


def test_files_are_written(tmp_path: Path):
    (tmp_path / "rows.json").write_text(json.dumps([*ROWS, *NATS]))
    written = plot_files([tmp_path / "rows.json"], tmp_path / "out")
    assert sorted(path.name for path in written) == [
        "accuracy-reasoner.png",
        "accuracy-reasoner.svg",
        "likelihood-reasoner.png",
        "likelihood-reasoner.svg",
    ]
    assert all(path.stat().st_size > 5000 for path in written)


def test_models_have_pictures_of_their_own():
    figures = accuracy_figures([*ROWS, *({**one, "model": "org/other"} for one in ROWS), *NATS])
    assert sorted(figures) == ["accuracy-reasoner--m", "accuracy-reasoner--org-other", "likelihood-reasoner--m"]


def test_a_cache_that_packed_nothing_is_no_point():
    figures = accuracy_figures([*ROWS, row("kitty", 0.5, None)])
    labels = [bar.get_label() for bar in figures["accuracy-reasoner"].axes[0].containers]
    assert labels == ["default", "kivi-2"]
