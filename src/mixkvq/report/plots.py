"""Pictures of results, drawn from the JSON files that the commands write."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixkvq.bench import BF16
from mixkvq.report.accuracy import accuracy_figures
from mixkvq.report.fidelity import fidelity_figures
from mixkvq.report.figures import COLOURS, FORMATS, GREY, MARKERS, PlotError, furnish, new_figure, save, slug
from mixkvq.report.retrieval import retrieval_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
#: Inches of a picture.
SIZE = (7.2, 3.8)
#: Points of a line by its label: x and y.
Series = dict[str, list[tuple[float, float]]]

#: Ticks whose quotient is smaller would write over each other.
TICK_QUOTIENT = 1.3


@dataclass(frozen=True)
class Picture:
    """What one picture shows.

    Attributes:
        name: of the files, without suffix.
        title, x, y: its words.
        lines: its data.
        level: a horizontal line to compare with, and its word.
        log_y: draw y on a logarithmic axis.
    """

    name: str
    title: str
    x: str
    y: str
    lines: Series
    level: tuple[float, str] | None = None
    log_y: bool = False


def plot_files(files: Sequence[Path], out: Path) -> list[Path]:
    """Draw the results in some files.

    Args:
        files: what ``mixkvq bench kernel``, ``generate`` and ``capacity``, ``mixkvq eval``, ``fidelity`` and
            ``retrieval`` wrote.
        out: a folder, made if it is not there.

    Returns:
        The pictures' files, a PNG and an SVG of each.

    Raises:
        PlotError: a file is not one of theirs, or holds too little for any picture, or matplotlib is missing.
    """
    rows = [row for file in files for row in _read(file)]
    pictures = [*_speed_ups(rows), *_throughputs(rows), *_memories(rows)]
    figures = {picture.name: draw(picture) for picture in pictures}
    figures |= accuracy_figures(rows) | fidelity_figures(rows) | retrieval_figures(rows)
    if not figures:
        raise PlotError(
            "There is nothing to draw in these files: a line takes results at two contexts (bench kernel, bench "
            "generate) or at two batches (bench generate, bench capacity), a front takes two caches (fidelity); "
            "accuracies (eval) and what was found (retrieval) stand for themselves."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlotError(f"Cannot write pictures to '{out}': {error}") from error
    written = []
    for name, figure in figures.items():
        for suffix in FORMATS:
            path = out / f"{name}{suffix}"
            save(figure, path)
            written.append(path)
    return written


def _read(file: Path) -> list[Row]:
    try:
        rows = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlotError(f"Cannot read '{file}': {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"cache", "device"} <= set(row) for row in rows):
        raise PlotError(f"'{file}' does not hold results of mixkvq bench, eval, fidelity or retrieval.")
    return rows


# What is drawn


def _speed_ups(rows: Iterable[Row]) -> list[Picture]:
    """From ``bench kernel``: ours against the fastest BF16 kernel, over context."""
    found: dict[str, Series] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "time_us" in row and row["cache"] != BF16:
            found[row["device"]][f"{row['cache']}, batch {row['batch']}"].append((row["context"], row["speed_up"]))
    return [
        Picture(
            name=_name("kernel-speed-up", device, found),
            title=f"Attention of one decode step, {device}",
            x="tokens of context",
            y="times faster than\nthe fastest BF16 kernel",
            lines=lines,
            level=(1.0, "BF16"),
        )
        for device, all_lines in found.items()
        if (lines := _drawable(all_lines))
    ]


def _throughputs(rows: Iterable[Row]) -> list[Picture]:
    """From ``bench generate`` and ``bench capacity``: tokens per second over batch, BF16 by its fastest kernel."""
    best: dict[tuple[str, str, int], dict[tuple[str, int], float]] = defaultdict(dict)
    for row in rows:
        if row.get("tokens_per_second") and "step_ms" in row and "kernel" in row:
            points, at = best[row["device"], row["model"], row["context"]], (row["cache"], row["batch"])
            points[at] = max(points.get(at, 0.0), row["tokens_per_second"])
    pictures = []
    for (device, model, context), points in best.items():
        lines: Series = defaultdict(list)
        for (cache, batch), speed in points.items():
            lines[cache].append((batch, speed))
        if drawable := _drawable(lines):
            pictures.append(
                Picture(
                    name=_name(f"throughput-{model}-{context}", device, {key[0] for key in best}),
                    title=f"Decoding {model} at {context:,} tokens of context, {device}",
                    x="sequences at once",
                    y="tokens per second",
                    lines=drawable,
                )
            )
    return pictures


def _memories(rows: Iterable[Row]) -> list[Picture]:
    """From ``bench generate``: gigabytes of cache for each sequence, over context."""
    found: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for row in rows:
        if row.get("cache_bytes") and "batch_ratio" not in row:
            at = row["cache"], row["context"]
            held = row["cache_bytes"] / row["batch"] / 1e9
            found[row["model"]][at] = min(found[row["model"]].get(at, held), held)
    pictures = []
    for model, points in found.items():
        lines: Series = defaultdict(list)
        for (cache, context), held in points.items():
            lines[cache].append((context, held))
        if drawable := _drawable(lines):
            pictures.append(
                Picture(
                    name=f"memory-{slug(model)}",
                    title=f"Cache of one sequence of {model}, everything counted",
                    x="tokens of context",
                    y="GB",
                    lines=drawable,
                    log_y=True,
                )
            )
    return pictures


def _drawable(lines: Series) -> Series:
    """Lines of two points or more, sorted; BF16 first."""
    kept = {label: sorted(points) for label, points in lines.items() if len({x for x, _ in points}) > 1}
    return dict(sorted(kept.items(), key=lambda item: item[0] != BF16))


def _name(name: str, device: str, devices: Iterable[str]) -> str:
    """A file name, with the device in it if there are several."""
    return slug(name if len(set(devices)) == 1 else f"{name}-{device}")


# How it is drawn


def draw(picture: Picture) -> Figure:
    """One picture as a matplotlib figure."""
    figure = new_figure(SIZE)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    if picture.log_y:
        axes.set_yscale("log", base=2)
    if picture.level is not None:
        level, word = picture.level
        axes.axhline(level, color=GREY, linewidth=1, linestyle="--")
        axes.annotate(word, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", color=GREY, fontsize=9)
    others = iter(zip(COLOURS * 9, MARKERS * 9, strict=True))
    for label, points in picture.lines.items():
        colour, marker = (GREY, "s") if label == BF16 else next(others)
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, marker=marker, markersize=5, linewidth=1.8, label=_shown(label))
        _figure_at(axes, points[-1], colour)
    _furnish(axes, picture)
    return figure


def _shown(label: str) -> str:
    return "BF16" if label == BF16 else label


def _figure_at(axes: Axes, point: tuple[float, float], colour: str) -> None:
    """The number at a line's last point."""
    text = f"{point[1]:,.0f}" if point[1] >= 100 else f"{point[1]:.2f}"
    axes.annotate(text, point, xytext=(6, 0), textcoords="offset points", va="center", color=colour, fontsize=9)


def _furnish(axes: Axes, picture: Picture) -> None:
    """Axes, words, legend."""
    ticks: list[float] = []
    for x in sorted({x for points in picture.lines.values() for x, _ in points}, reverse=True):
        if not ticks or ticks[-1] / x > TICK_QUOTIENT:
            ticks.append(x)
    axes.set_xticks(ticks, [f"{int(x):,}" for x in ticks], fontsize=9)
    axes.minorticks_off()
    axes.margins(x=0.09, y=0.12)
    if picture.log_y:
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.3g}")
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.6g}")
    furnish(axes, picture.x, picture.y)
    axes.set_title(picture.title, fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="best")
