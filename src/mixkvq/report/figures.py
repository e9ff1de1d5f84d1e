"""What all pictures share: colours, sizes, formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Of lines, in order; told apart by readers who do not see all colours (Okabe and Ito). BF16 is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"
MARKERS = "osD^vP"
#: Dots of an inch: a README's width with room for high resolutions.
DOTS = 200
#: How pictures are saved, by the end of their names.
FORMATS: dict[str, dict[str, Any]] = {".png": {"dpi": DOTS}, ".svg": {"metadata": {"Date": None}}}


class PlotError(RuntimeError):
    """Results that cannot be drawn, or nothing to draw with."""


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of so many inches.

    Raises:
        PlotError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError('Pictures take the "plots" extra: pip install "mixkvq[plots]".') from None
    return Figure(figsize=size, layout="constrained")


def furnish(axes: Axes, x: str, y: str) -> None:
    """Words, grid and ticks, as all lines and points have them."""
    axes.tick_params(labelsize=9, length=3)
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def check_format(path: Path) -> None:
    """Complain about a name that does not end in one of :data:`FORMATS`.

    Raises:
        PlotError: it does not.
    """
    if path.suffix not in FORMATS:
        raise PlotError(f"'{path}': a picture's name ends in {' or '.join(FORMATS)}.")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as one of :data:`FORMATS`.

    Raises:
        PlotError: the name does not end in one of them.
    """
    check_format(path)
    figure.savefig(path, **FORMATS[path.suffix])


def slug(text: str) -> str:
    """A file name of it."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text.lower())
