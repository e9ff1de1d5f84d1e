"""The picture of what caches cost on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixkvq.bench import BF16
from mixkvq.report.figures import COLOURS, GREY, furnish, new_figure, slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that none beats in both coordinates (smaller is better), by rising first coordinate."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def fidelity_figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """A figure for every model and text, by the name of its file.

    Args:
        rows: of ``mixkvq fidelity``; others, and full precision, are passed over.

    Raises:
        PlotError: matplotlib is missing.
    """
    texts: dict[str, list[Row]] = {}
    for row in rows:
        if {"kl", "bits", "text", "window"} <= set(row) and row["cache"] != BF16:
            texts.setdefault(" ".join(row["text"]), []).append(row)
    single = len(texts) == 1
    return {
        "fidelity" if single else slug(f"fidelity-{text}"): _kl_over_bits(found)
        for text, found in texts.items()
        if len(found) > 1
    }


def _kl_over_bits(rows: Sequence[Row]) -> Figure:
    figure = new_figure((7.6, 5.0))
    axes = figure.add_subplot()
    points = [(row.get("size_bits", row["bits"]), row["kl"]) for row in rows]  # older rows have no size_bits
    front = pareto_front(points)
    axes.plot(*zip(*(points[i] for i in front), strict=True), color=COLOURS[0], linewidth=1, label="Pareto front")
    for i, (row, point) in enumerate(zip(rows, points, strict=True)):
        axes.plot(*point, "o", color=COLOURS[0] if i in front else GREY, markersize=6)
        axes.annotate(row["cache"], point, xytext=(6, 3), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.margins(x=0.15)
    furnish(axes, "honest bits per element", "KL from full precision, nats per token")
    axes.legend(frameon=False, fontsize=9)
    return figure
