"""Texts to measure on."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

#: What a measurement without ``--text`` reads: the language reference that every Python carries.
BUILT_IN = "Python's language reference"


class TextError(ValueError):
    """A text that cannot be read, or is too short."""


def read_text(path: str | Path | None) -> str:
    """A file's text, or the built-in one for None."""
    if path is None:
        topics = pydoc_data.topics.topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"Cannot read the text '{path}': {error}") from error


def windows(tokenizer: PreTrainedTokenizerBase, paths: Sequence[str | Path | None], size: int, count: int) -> Tensor:
    """The first ``count`` windows of ``size`` tokens of each text, without overlap: ``[N, size]``.

    Raises:
        TextError: a text has not one window.
    """
    if size < 1 or count < 1:
        raise TextError(f"{count} windows of {size} tokens: both are at least 1.")
    cut = []
    for path in paths:
        text = read_text(path)
        # No token is longer than its text is, so this many characters are enough for most texts; read on if not.
        need, characters = size * count, 8 * size * count
        tokens = tokenizer(text[:characters])["input_ids"]
        if len(tokens) < need and characters < len(text):
            tokens = tokenizer(text)["input_ids"]
        found = min(count, len(tokens) // size)
        if found == 0:
            raise TextError(
                f"The text '{path or BUILT_IN}' has {len(tokens)} tokens, a window takes {size}: give a longer "
                "text, or a smaller --window."
            )
        cut.append(torch.tensor(tokens[: found * size], dtype=torch.long).view(found, size))
    return torch.cat(cut)
