"""The picture of what caches cost on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixkvq.bench import BF16
from mixkvq.evaluate.statistics import pareto_front
from mixkvq.report.figures import COLOURS, GREY, furnish, new_figure, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
#: The axes that fidelity is drawn on.
BITS = "honest bits per element"
KL = "KL from full precision, nats per token"
#: Points that can all have their names beside them.
MAX_NAMES = 25
#: Points of the page within which two points of the data cover each other.
SAME = 3
#: Points that a letter of a name and its line take, and where a name may stand beside its point, best first.
LETTER, LINE = 4.4, 9.0
OFFSETS = ((6, 3), (6, -6), (6, 12), (6, -15), (-6, 3), (-6, -6), (6, 21), (-6, 12), (6, -24), (-6, -15))


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


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside points, each in the first place where it covers no other name and no point."""
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()  # axes have their limits only now
    unit = figure.dpi / 72
    # Points that cover each other have their names on one line.
    together: list[tuple[list[str], tuple[float, float], tuple[float, float]]] = []
    for name, place in points.items():
        x, y = axes.transData.transform(place) / unit
        near = (names for names, _, (left, low) in together if abs(left - x) < SAME and abs(low - y) < SAME)
        if (names := next(near, None)) is None:
            together.append(([name], place, (x, y)))
        else:
            names.append(name)
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for _, _, (x, y) in together]
    for names, place, (x, y) in together:
        name = ", ".join(names)
        width = LETTER * len(name)
        for dx, dy in OFFSETS:
            box = Bbox.from_bounds(x + (dx if dx > 0 else dx - width), y + dy - 2, width, LINE)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        side = "left" if dx > 0 else "right"
        axes.annotate(name, place, xytext=(dx, dy), textcoords="offset points", fontsize=8, ha=side)


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
    for i, place in enumerate(places):
        axes.plot(*place, "o", color=COLOURS[0] if i in front else GREY, markersize=6)
    if log_y:
        axes.set_yscale("log")
    axes.margins(x=0.15)
    furnish(axes, x, y)
    _name_points(axes, {names[i]: places[i] for i in range(len(names)) if i in front or len(names) <= MAX_NAMES})
    axes.legend(frameon=False, fontsize=9)
    return figure
