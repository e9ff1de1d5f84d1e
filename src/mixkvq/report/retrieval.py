"""What ``mixkvq retrieval`` found: a table, and a heat map of depth by length."""

from __future__ import annotations

import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from mixkvq.evaluate.retrieval import Cell, Reply, Summary
from mixkvq.evaluate.retrieval.summary import SURE
from mixkvq.report.figures import new_figure, slug
from mixkvq.report.tables import new_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

#: Its colours get darker all the way, so that they can be read in black and white.
COLOURS = "YlGnBu"
#: Shares above this are written upon in white, which then stands out as much as black does below it.
DARK = 0.68
#: Inches of a panel's cell, and of what stands around the panels.
CELL_WIDTH, CELL_HEIGHT, MARGIN = 0.62, 0.36, (1.7, 1.2)
#: Inches of a panel at least, so that its title has room, and characters of the picture's title in an inch.
LEAST_WIDTH, LEAST_HEIGHT, TITLE = 1.5, 1.2, 10


def retrieval_table(title: str, rows: Sequence[Summary]) -> Table:
    """One kind and cache a row; log-probabilities are in nats per token of the right answer.

    Where full precision is sure, the share found stands with the number of such cells (lengths and depths).
    """
    columns = ["cache", "kind", "found"]
    compared = any(row.difference is not None for row in rows)
    table = new_table(title, *columns, *([f"where bf16 > {SURE:.0%}", "log p to bf16"] if compared else []))
    table.columns[1].justify = "left"
    for row in rows:
        cells = [escape(row.cache), row.kind, f"{row.found:.1%}"]
        if row.difference is not None:
            sure = "nowhere" if row.sure is None else f"{row.sure:.1%} in {row.sure_cells}"
            cells += [sure, f"{row.difference:+.3f}"]
        table.add_row(*cells)
    return table


def retrieval_figures(rows: Iterable[dict[str, Any]]) -> dict[str, Figure]:
    """Heat maps by file name, one for each model in what ``mixkvq retrieval --json`` wrote; other rows are left out."""
    models: dict[str, list[Cell]] = defaultdict(list)
    for row in rows:
        if {"kind", "depth", "replies"} <= set(row):
            fields = {name: row[name] for name in ("cache", "kind", "length", "depth", "found", "log_probability")}
            replies = tuple(Reply(**reply) for reply in row["replies"])
            models[row["model"]].append(Cell(**fields, bits=row["bits"], replies=replies))
    return {
        "retrieval" if len(models) == 1 else f"retrieval-{slug(model)}": heat_map(cells, f"Found by {model}")
        for model, cells in models.items()
    }


def heat_map(cells: Sequence[Cell], title: str = "") -> Figure:
    """A panel for each kind (rows) and cache (columns): the share found, by depth and length. What was not asked is
    left white.

    Raises:
        PlotError: matplotlib is missing.
    """
    kinds, caches = _in_order(cell.kind for cell in cells), _in_order(cell.cache for cell in cells)
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    width = max(CELL_WIDTH * len(lengths), LEAST_WIDTH) * len(caches)
    height = max(CELL_HEIGHT * len(depths), LEAST_HEIGHT) * len(kinds)
    figure = new_figure((width + MARGIN[0], height + MARGIN[1]))
    panels = figure.subplots(len(kinds), len(caches), sharex=True, sharey=True, squeeze=False)
    found = {(cell.kind, cell.cache, cell.length, cell.depth): cell.found for cell in cells}
    for kind, row in zip(kinds, panels, strict=True):
        for cache, axes in zip(caches, row, strict=True):
            shares = [[found.get((kind, cache, length, depth), math.nan) for length in lengths] for depth in depths]
            image = _panel(axes, shares)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        row[0].set_ylabel(f"{kind}\ndepth", fontsize=10)
    for cache, axes in zip(caches, panels[0], strict=True):
        # Where names of presets with overrides may fold.
        axes.set_title(re.sub("[:,]", r"\g<0>\n", cache), fontsize=10)
    bar = figure.colorbar(image, ax=panels, format=lambda share, _: f"{share:.0%}")
    bar.set_label("found", fontsize=10)
    bar.ax.tick_params(labelsize=9)
    figure.supxlabel("tokens of prompt and answer", fontsize=10)
    figure.suptitle(textwrap.fill(title, round(TITLE * figure.get_figwidth())), fontsize=11, x=0.01, ha="left")
    return figure


def _panel(axes: Axes, shares: list[list[float]]) -> AxesImage:
    """One kind and cache: ``shares`` by depth and length."""
    image = axes.imshow(shares, vmin=0, vmax=1, cmap=COLOURS, aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if math.isnan(share):
                continue
            colour = "white" if share > DARK else "black"
            axes.text(x, y, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=9)
    axes.tick_params(labelsize=9, length=3)
    # White lines between the cells.
    axes.set_xticks([x + 0.5 for x in range(len(shares[0]) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(shares) - 1)], minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color="white", linewidth=1)
    return image


def _in_order(words: Iterable[str]) -> list[str]:
    """Words without repeats."""
    return list(dict.fromkeys(words))
