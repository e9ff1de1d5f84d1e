"""``mixkvq bench plot``: pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixkvq.cli.common import InputError, clean_exit, say
from mixkvq.report.figures import PlotError
from mixkvq.report.plots import plot_files


def plot(
    files: Annotated[list[Path], typer.Argument(help="JSON files that bench, eval, fidelity or retrieval wrote.")],
    out: Annotated[Path, typer.Option(help="The folder for the pictures.")] = Path(),
) -> None:
    """Draw what the files hold: speed-up, memory, throughput, accuracies, KL over bits, heat maps; as PNG and SVG."""
    with clean_exit():
        try:
            pictures = plot_files(files, out)
        except PlotError as error:
            raise InputError(str(error)) from error
        for picture in pictures:
            say(f"Wrote {picture}")
