"""The heat map of depth by length, and the table beside it."""

from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from rich.console import Console

from mixkvq.evaluate.retrieval import Cell, Summary
from mixkvq.report.figures import save
from mixkvq.report.retrieval import heat_map, retrieval_figures, retrieval_table

KINDS, CACHES, LENGTHS, DEPTHS = (
    ("needle", "variables"),
    ("bf16", "default:budget=3,sinks=0"),
    (2048, 1024),
    (0, 0.5, 1),
)
CELLS = [
    Cell(cache, kind, length, depth, found=depth / 2, log_probability=-1.0, bits=None, replies=())
    for kind in KINDS
    for length in LENGTHS
    for depth in DEPTHS
    for cache in CACHES
]


def test_panels_and_labels(tmp_path: Path):
    figure = heat_map(CELLS, "Found")
    *panels, bar = figure.axes
    assert len(panels) == len(KINDS) * len(CACHES)
    assert panels[0].get_title() == "bf16"
    assert panels[1].get_title() == "default:\nbudget=3,\nsinks=0"
    assert [axes.get_ylabel() for axes in panels] == ["needle\ndepth", "", "variables\ndepth", ""]
    for axes in panels:
        assert [text.get_text() for text in axes.texts] == ["0%", "0%", "25%", "25%", "50%", "50%"]
        assert axes.images[0].get_clim() == (0, 1)
        assert axes.images[0].get_array().tolist() == [[0, 0], [0.25, 0.25], [0.5, 0.5]]
    assert [tick.get_text() for tick in panels[-1].get_xticklabels()] == ["1,024", "2,048"]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == ["0%", "50%", "100%"]
    assert bar.get_ylabel() == "found"
    for name in ("map.svg", "map.png"):
        save(figure, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_files_of_results_are_drawn_by_model():
    rows = [{**cell.as_dict(), "model": "tiny"} for cell in CELLS if (cell.kind, cell.depth) != ("variables", 0.5)]
    figures = retrieval_figures([*rows, {"cache": "bf16", "kl": 0.0}])
    assert list(figures) == ["retrieval"]
    shares = figures["retrieval"].axes[2].images[0].get_array()
    assert shares.mask.tolist() == [[False, False], [True, True], [False, False]]  # what was not asked is left white
    assert len(figures["retrieval"].axes[2].texts) == 4
    two = retrieval_figures([*rows, {**rows[0], "model": "other"}])
    assert sorted(two) == ["retrieval-other", "retrieval-tiny"]


def test_colours_can_be_read_in_black_and_white():
    """From light to dark all the way, and words on them stand out."""
    figure = heat_map(CELLS)
    colours = figure.axes[0].images[0].cmap([share / 20 for share in range(21)])
    light = colours[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (light[:-1] > light[1:]).all()


def test_table():
    rows = [
        Summary("bf16", "needle", 0.95, 1.0, 3, 0.0),
        Summary("kivi-2", "needle", 0.5, 2 / 3, 3, -0.25),
        Summary("kivi-2", "needles", 0.5, None, 0, -0.25),
    ]
    console = Console(width=120, record=True)
    console.print(retrieval_table("Found", rows))
    text = console.export_text()
    for word in ("95.0%", "where bf16 > 90%", "66.7% in 3", "-0.250", "nowhere", "log p to bf16"):
        assert word in text
    console.print(retrieval_table("Found", [Summary("kivi-2", "needle", 0.5, None, 0, None)]))
    assert "bf16" not in console.export_text()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.67, 0.69, 1.0])
def test_words_on_colours_stand_out(share: float):
    axes = heat_map([Cell("bf16", "needle", 1024, 0.5, share, -1.0, None, ())]).axes[0]
    colours = axes.texts[0].get_color(), axes.images[0].cmap(share)
    words, background = (luminance(to_rgb(colour)) for colour in colours)
    light, dark = max(words, background), min(words, background)
    assert (light + 0.05) / (dark + 0.05) > 4.3  # contrast as in WCAG, which asks for 4.5 of small print


def luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance of an sRGB colour."""
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour)
    return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))
