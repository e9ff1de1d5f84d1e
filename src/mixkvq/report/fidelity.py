"""The picture of what caches cost on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixkvq.bench import BF16
from mixkvq.evaluate.statistics import pareto_front
from mixkvq.report.figures import COLOURS, GREY, furnish, new_figure, slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
#: The axes that fidelity is drawn on.
BITS = "honest bits per element"
KL = "KL from full precision, nats per token"
#: Points that can all have their names beside them.
MAX_NAMES = 25


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
    points = {row["cache"]: (row.get("size_bits", row["bits"]), row["kl"]) for row in rows}  # older rows lack it
    return front_figure(points, BITS, KL, log_y=True)


def front_figure(points: Mapping[str, tuple[float, float]], x: str, y: str, *, log_y: bool) -> Figure:
    """Points by name, those that none beats in both coordinates on a line; only these are named where there are many.

    Raises:
        PlotError: matplotlib is missing.
    """
    figure = new_figure((7.6, 5.0))
    axes = figure.add_subplot()
    names, places = list(points), list(points.values())
    front = pareto_front(places)
    axes.plot(*zip(*(places[i] for i in front), strict=True), color=COLOURS[0], linewidth=1, label="Pareto front")
    for i, (name, place) in enumerate(zip(names, places, strict=True)):
        axes.plot(*place, "o", color=COLOURS[0] if i in front else GREY, markersize=6)
        if i in front or len(points) <= MAX_NAMES:
            axes.annotate(name, place, xytext=(6, 3), textcoords="offset points", fontsize=8)
    if log_y:
        axes.set_yscale("log")
    axes.margins(x=0.15)
    furnish(axes, x, y)
    axes.legend(frameon=False, fontsize=9)
    return figure
