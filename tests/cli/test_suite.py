"""``mixkvq fidelity --suite all``: every system over the same windows, and its picture."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixkvq.cli import app
from mixkvq.config import all_presets
from mixkvq.evaluate.statistics import pareto_front
from mixkvq.report.fidelity import front_figure


def test_the_front_is_what_none_beats():
    points = [(3.0, 0.5), (2.0, 1.0), (2.5, 1.2), (4.0, 0.5), (3.0, 0.4), (5.0, 0.1)]
    assert pareto_front(points) == [1, 4, 5]
    assert pareto_front([]) == []


def test_every_preset_is_a_row(chat: Path, tmp_path: Path):
    rows, words = tmp_path / "rows.json", ["--window", "256", "--windows", "1"]
    run = CliRunner(env={"COLUMNS": "120"}).invoke
    result = run(app, ["fidelity", "--suite", "all", "--model", str(chat), *words, "--json", str(rows)])
    assert result.exit_code == 0, result.output
    found = {row["cache"] for row in json.loads(rows.read_text())}
    # The package's calibrations are for another model.
    names = {name.partition(":")[0] for name in found}
    assert names == {name for name in all_presets() if name != "bf16" and not name.startswith("paper-")}
    assert "pm-kvq-4:plan_tokens=256" in found
    pytest.importorskip("matplotlib")
    result = run(app, ["bench", "plot", str(rows), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "fidelity.svg").exists()


def test_names_cover_neither_each_other_nor_points():
    pytest.importorskip("matplotlib")
    points = {f"cache-{i}": (3 + i / 50, 0.1 + i / 400) for i in range(5)} | {"twin": (3.0, 0.1), "far": (8.0, 0.2)}
    figure = front_figure(points, "bits", "KL", log_y=True, numbered=False)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"cache-0, twin", *(f"cache-{i}" for i in range(1, 5)), "far"}
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])


def test_a_search_s_picture_numbers_its_front_and_marks_what_was_chosen():
    pytest.importorskip("matplotlib")
    front = {f"8/4 4/4 2/2 {i}": (2 + i / 40, 0.9**i) for i in range(12)}
    worse = {f"worse {i}": (2 + i / 30, 1.2 * 0.99**i) for i in range(40)}
    chosen = "8/4 4/4 2/2 5"
    figure = front_figure(front | worse, "bits", "KL", log_y=True, chosen=chosen, limit=2.13)
    figure.canvas.draw()
    (axes,), (listed,) = figure.axes, figure.legends
    assert [text.get_text() for text in listed.get_texts()] == [f"{i}  {name}" for i, name in enumerate(front, 1)]
    assert {text.get_text() for text in axes.texts} == {str(i) for i in range(1, 13)}
    marks = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert marks["chosen"] == [list(front[chosen])]
    assert {x for x, _ in marks["asked for: 2.13"]} == {2.13}
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for at, a in enumerate(boxes) for b in boxes[:at])


def test_few_points_are_all_numbered():
    pytest.importorskip("matplotlib")
    points = {"best": (2.0, 0.5), "worse": (2.5, 0.7), "wide": (3.0, 0.1)}
    figure = front_figure(points, "bits", "KL", log_y=True)
    (axes,), (listed,) = figure.axes, figure.legends
    assert [text.get_text() for text in listed.get_texts()] == ["1  best", "2  worse", "3  wide"]
    assert len({text.get_color() for text in listed.get_texts()}) == 2  # the front, and the others
    assert {text.get_text() for text in axes.texts} == {"1", "2", "3"}


def test_nothing_but_the_front_is_in_a_search_s_picture_without_a_choice():
    pytest.importorskip("matplotlib")
    figure = front_figure({"a": (2.0, 1.0), "b": (3.0, 0.5)}, "bits", "KL", log_y=False)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Pareto front"]
