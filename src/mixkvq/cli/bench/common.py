"""What the ``bench`` commands share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from mixkvq.bench.environment import environment
from mixkvq.bench.shapes import SHAPES, random_model
from mixkvq.cli.common import InputError, progress
from mixkvq.cli.files import write_json
from mixkvq.cli.loading import load_model, parse_dtype

BatchOption = Annotated[
    list[int] | None, typer.Option("--batch", help="Sequences; may be repeated, in pairs with --context.")
]
ContextOption = Annotated[list[int] | None, typer.Option("--context", help="Tokens of each sequence.")]
ShapeOption = Annotated[str | None, typer.Option("--shape", help=f"A model with random weights: {', '.join(SHAPES)}.")]
RealModelOption = Annotated[
    str | None, typer.Option("--model", help="A name on the Hugging Face hub or a folder, instead of --shape.")
]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def require_gpu(command: str) -> None:
    """Complain if there is no GPU."""
    if not torch.cuda.is_available():
        raise InputError(
            f"mixkvq {command} measures a GPU, and torch {torch.__version__} finds none here. On a CPU there is "
            "mixkvq bench decode."
        )


def check_positive(**options: int | Sequence[int]) -> None:
    """Complain about numbers below 1, by the option's name."""
    for name, given in options.items():
        for number in [given] if isinstance(given, int) else given:
            if number < 1:
                raise InputError(f"--{name.replace('_', '-')} {number}: it is 1 or more.")


def pairs(
    batches: Sequence[int] | None, contexts: Sequence[int] | None, batch: int, context: int
) -> list[tuple[int, int]]:
    """Batches and contexts as the user paired them; one batch serves any number of contexts."""
    batches, contexts = batches or [batch], contexts or [context]
    check_positive(batch=batches, context=contexts)
    if len(batches) == 1:
        batches = [*batches] * len(contexts)
    if len(batches) != len(contexts):
        raise InputError(
            f"{len(batches)} of --batch and {len(contexts)} of --context: give one of each for every pair, or one "
            "--batch for all."
        )
    return list(zip(batches, contexts, strict=True))


def chosen_model(shape: str | None, model: str | None, dtype: str, device: str | None) -> tuple[PreTrainedModel, str]:
    """The model to measure, and its name in the results."""
    kind = parse_dtype(dtype)
    if (shape is None) == (model is None):
        raise InputError(f"Give either --shape ({', '.join(SHAPES)}) or --model.")
    if model is not None:
        return load_model(model, kind, device)[0], model
    assert shape is not None
    if shape not in SHAPES:
        raise InputError(f"There is no shape '{shape}'. Known: {', '.join(SHAPES)}. For a real model give --model.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return random_model(shape, kind, torch.device(device)), shape
    except torch.OutOfMemoryError:
        raise InputError(f"The weights of '{shape}' in {dtype} do not fit into the memory of '{device}'.") from None
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"Cannot make a model on '{device}': {str(error).splitlines()[0]}") from error


def parse_size(text: str) -> int:
    """Bytes as people write them: 78GB, 500 MB, 1234."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)b?", text.strip().lower())
    try:
        assert match is not None
        return int(float(match[1]) * _UNITS[match[2]])
    except (AssertionError, ValueError):
        raise InputError(f"'{text}' is not a size. Write 78GB, 500MB, or a number of bytes.") from None


@contextmanager
def spinner(title: str) -> Iterator[Callable[[str], None]]:
    """A bar without an end; yields a function that says what was just done."""
    with progress() as bar:
        task = bar.add_task(title, total=None)
        yield lambda what: bar.update(task, description=what)


def write_rows(path: Path | None, rows: Sequence[Any], **about: str) -> None:
    """Rows with what was measured and where, if a file was asked for."""
    where = environment()
    write_json(path, [{**dataclasses.asdict(row), **about, **where} for row in rows])
