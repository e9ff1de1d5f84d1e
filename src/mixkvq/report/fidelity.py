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
#: The same for a number of the front, below and left of which there are neither points nor the front's line.
BELOW = ((-3, -10), (-6, -6), (-2, -19), (-12, -10), (-12, -1), (-12, -19), (-2, -28), *OFFSETS)
#: Names that have room in a column beside the axes, and points that are all numbered; of more, those of the front.
COLUMN, MAX_NUMBERS = 28, 40


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
    return front_figure(points, BITS, KL, log_y=True, numbered=len(points) > MAX_NAMES)


def _name_points(
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    others: Sequence[tuple[float, float]] = (),
    offsets: Sequence[tuple[int, int]] = OFFSETS,
) -> None:
    """Write names beside points, each in the first of ``offsets`` where it covers no name and no point, the ``others``
    included.
    """
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
    centres = [centre for _, _, centre in together] + [axes.transData.transform(place) / unit for place in others]
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in centres]
    for names, place, (x, y) in together:
        name = ", ".join(names)
        width = LETTER * len(name)
        for dx, dy in offsets:
            box = Bbox.from_bounds(x + (dx if dx > 0 else dx - width), y + dy - 2, width, LINE)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        side = "left" if dx > 0 else "right"
        axes.annotate(name, place, xytext=(dx, dy), textcoords="offset points", fontsize=8, ha=side)


def front_figure(
    points: Mapping[str, tuple[float, float]],
    x: str,
    y: str,
    *,
    log_y: bool,
    chosen: str | None = None,
    limit: float | None = None,
    numbered: bool = True,
) -> Figure:
    """Points by name, those that none beats in both coordinates on a line.

    Args:
        x, y: what the axes are.
        log_y: whether the second is logarithmic.
        chosen: the name of a point to mark.
        limit: of the first coordinate, what was asked for; drawn as a line.
        numbered: number points, and list their names beside the axes: names are long, or points many. Otherwise all
            have their names beside them.

    Raises:
        KeyError: no point has the chosen name.
        PlotError: matplotlib is missing.
    """
    figure = new_figure((7.6, 5.0))
    axes = figure.add_subplot()
    names, places = list(points), list(points.values())
    front = pareto_front(places)
    axes.plot(*zip(*(places[i] for i in front), strict=True), color=COLOURS[0], linewidth=1, label="Pareto front")
    for i, place in enumerate(places):
        axes.plot(*place, "o", color=COLOURS[0] if i in front else GREY, markersize=6)
    _mark(axes, None if chosen is None else points[chosen], limit)
    if log_y:
        axes.set_yscale("log")
    axes.margins(x=0.15)
    furnish(axes, x, y)
    # Above the right of a front are the worst points; names may be anywhere.
    axes.legend(loc="upper right" if numbered else "best", frameon=False, fontsize=9)
    if numbered:
        _number_points(axes, points, [names[i] for i in front], chosen)
    else:
        _name_points(axes, points)
    return figure


def _mark(axes: Axes, chosen: tuple[float, float] | None, limit: float | None) -> None:
    """Draw a ring around a point, and a line at a first coordinate."""
    if limit is not None:
        axes.axvline(limit, color=GREY, linewidth=1, linestyle="--", zorder=0, label=f"asked for: {limit:g}")
    if chosen is not None:
        ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8}
        axes.plot(*chosen, "o", color=COLOURS[1], linestyle="none", label="chosen", **ring)


def _number_points(
    axes: Axes, points: Mapping[str, tuple[float, float]], front: Sequence[str], chosen: str | None
) -> None:
    """Number points from left to right, and list their names beside the axes, the front's in its colour; of many points
    those of the front and the chosen one.
    """
    from matplotlib.lines import Line2D

    named = {*points} if len(points) <= MAX_NUMBERS else {*front, *([] if chosen is None else [chosen])}
    order = sorted(named, key=lambda name: (points[name], name))
    figure = axes.get_figure(root=True)
    assert figure is not None
    lines, columns = [f"{number}  {name}" for number, name in enumerate(order, 1)], -(-len(order) // COLUMN)
    wider = columns * (LETTER * max(map(len, lines)) + 20) / 72
    figure.set_size_inches(figure.get_figwidth() + wider, figure.get_figheight())
    listed = figure.legend(
        [Line2D([], [], linestyle="none")] * len(order),
        lines,
        loc="outside right upper",
        ncols=columns,
        frameon=False,
        fontsize=8,
        handlelength=0,
        handletextpad=0,
        labelspacing=0.3,
    )
    colours = dict.fromkeys(front, COLOURS[0]) | ({} if chosen is None else {chosen: COLOURS[1]})
    for name, text in zip(order, listed.get_texts(), strict=True):
        text.set_color(colours.get(name, GREY))
    axes.margins(y=0.1)  # there are numbers below the last point
    numbers = {name: str(number) for number, name in enumerate(order, 1)}
    for names, offsets in (({*front}, BELOW), (named - {*front}, OFFSETS)):
        others = [place for name, place in points.items() if name not in names]
        _name_points(axes, {numbers[name]: points[name] for name in order if name in names}, others, offsets)
