"""Files that commands write: refused in time, and written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixkvq.cli.common import InputError, say
from mixkvq.files import write_whole
from mixkvq.report.figures import PlotError, check_format, new_figure


def check_writable(path: Path | None) -> None:
    """Complain about a result file that cannot be written before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"Cannot write '{path}': it is a folder.")
    if not (folder := path.resolve().parent).is_dir():
        raise InputError(f"Cannot write '{path}': there is no folder '{folder}'.")
    device = path.exists() and not path.is_file()
    if not os.access(path if device else folder, os.W_OK):
        raise InputError(f"Cannot write '{path}': nothing may be written {'to it' if device else f'in {folder}'}.")


def check_files(written: Sequence[Path | None], read: Sequence[Path] | None) -> None:
    """Complain about results that cannot be written, or would be written over a text or each other."""
    texts = {path.resolve() for path in read or ()}
    taken: set[Path] = set()
    for path in written:
        check_writable(path)
        if path is None or (path.exists() and not path.is_file()):
            continue
        if path.resolve() in texts:
            raise InputError(f"'{path}' is the text to read, and would be written over.")
        if path.resolve() in taken:
            raise InputError(f"'{path}' would be written twice: give every result a file of its own.")
        taken.add(path.resolve())


def check_plot(path: Path | None) -> None:
    """Complain about a picture that could not be drawn before the work, not after it."""
    if path is None:
        return
    try:
        check_format(path)
        new_figure((1, 1))
    except PlotError as error:
        raise InputError(str(error)) from error


def write_json(path: Path | None, rows: Any) -> None:
    """Write results, if a file was asked for."""
    if path is not None:
        write_whole(path, json.dumps(rows, indent=2) + "\n")
        say(f"Wrote {path}")
