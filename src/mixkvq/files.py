"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text beside ``path``, and move it there once it is whole: what was there stays until then.

    Raises:
        OSError: it cannot be written; ``path`` is what it was.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):  # a link stays one, such as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f".{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
