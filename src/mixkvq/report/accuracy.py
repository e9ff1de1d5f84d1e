"""Pictures of what ``mixkvq eval`` and ``mixkvq fidelity --reasoner`` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from mixkvq.bench import BF16
from mixkvq.report.figures import COLOURS, GREY, MARKERS, furnish, new_figure, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
#: Inches of a picture with one panel, and of one with two.
ONE, TWO = (7.2, 4.6), (10.0, 4.2)


def accuracy_figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Figures by the name of their files, as far as there are results for them.

    Args:
        rows: of ``mixkvq eval`` (of any tasks) and of ``mixkvq fidelity --reasoner``; others are passed over.

    Raises:
        PlotError: matplotlib is missing.
    """
    tasks: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if {"accuracy", "low", "high", "lengths", "task", "model"} <= set(row):
            tasks.setdefault((row["task"], row["model"]), []).append(row)
    single = len({model for _, model in tasks}) == 1
    figures = {}
    for (task, model), found in tasks.items():
        about = task if single else f"{task}, {model}"
        figures[slug(f"accuracy-{about}")] = _accuracy(about, found)
        scored = (row for row in rows if "chains" in row and row["model"] == model)
        nats = {row["cache"]: row["chains"]["nats_per_chain"] for row in scored}
        both = [row for row in found if row["cache"] in nats]
        if task == "reasoner" and len(both) > 1:
            figures[slug(f"likelihood-{about}")] = _by_likelihood(both, nats)
    return figures


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for every cache; grey for full precision."""
    others = cycle((colour, marker) for marker in MARKERS for colour in COLOURS)
    styles = {}
    for row in rows:
        colour, marker = (GREY, "s") if row["cache"] == BF16 else next(others)
        styles[row["cache"]] = {"color": colour, "marker": marker, "markersize": 6}
    return styles


def _accuracy(task: str, rows: Sequence[Row]) -> Figure:
    """Over honest bits with 95% intervals, and by length of the right chain where there are chains."""
    chains = any(row["lengths"] for row in rows)
    figure, styles = new_figure(TWO if chains else ONE), _styles(rows)
    first, *more = figure.subplots(1, 2 if chains else 1, squeeze=False)[0]
    for row in rows:
        if row["bits"] is None:
            continue  # nothing was long enough to be packed
        if row["cache"] == BF16:
            first.axhspan(row["low"], row["high"], color=GREY, alpha=0.15, linewidth=0)
            first.axhline(row["accuracy"], color=GREY, linestyle="--", linewidth=1)
            first.annotate("BF16", (0.01, row["accuracy"]), xycoords=("axes fraction", "data"), va="top", fontsize=9)
            continue
        _point(first, row["bits"], row, styles)
    _furnish(first, "honest bits per element", f"right answers, {rows[0]['questions']:,} questions")
    for axes in more:
        names = list(dict.fromkeys(name for row in rows for name in row["lengths"]))
        for row in rows:
            xs = [names.index(name) for name in row["lengths"]]
            ys = [group["accuracy"] for group in row["lengths"].values()]
            axes.plot(xs, ys, label=row["cache"], **styles[row["cache"]])
        axes.set_xticks(range(len(names)), names)
        _furnish(axes, "tokens of the right chain", "")
    handles, labels = (more[0] if more else first).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(task, fontsize=11, x=0.01, ha="left")
    return figure


def _by_likelihood(rows: Sequence[Row], nats: Mapping[str, float]) -> Figure:
    """Right answers against how likely the right chains are: the second predicts the first if points lie on a line."""
    figure, styles = new_figure(ONE), _styles(rows)
    axes = figure.add_subplot()
    for row in rows:
        _point(axes, nats[row["cache"]], row, styles)
    axes.set_xscale("log")
    _furnish(axes, "nats per right chain", "right answers")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _point(axes: Axes, x: float, row: Row, styles: Mapping[str, dict[str, Any]]) -> None:
    """A cache's accuracy with its interval."""
    reach = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
    axes.errorbar(x, row["accuracy"], reach, label=row["cache"], capsize=3, linestyle="", **styles[row["cache"]])


def _furnish(axes: Axes, x: str, y: str) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    furnish(axes, x, y)
