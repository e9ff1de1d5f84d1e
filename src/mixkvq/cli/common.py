"""What the commands share: options, consoles, tables, errors without a traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mixkvq.adapters.transformers import UnsupportedModelError
from mixkvq.config import ConfigError, MixKVQConfig
from mixkvq.evaluate.chains import ChatTemplateError
from mixkvq.evaluate.errors import EvaluationError
from mixkvq.evaluate.texts import TextError
from mixkvq.models import DEFAULT_MODEL, ModelError
from mixkvq.store.books import CacheFullError

#: Results go to standard output, everything else here.
notes = Console(stderr=True)
output = Console()

#: Characters that a table may take in a terminal that has fewer.
TABLE_WIDTH = 120


ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="A name on the Hugging Face hub, or a folder.", show_default=DEFAULT_MODEL),
]
CacheHelp = "A preset (see `mixkvq caches`), with overrides if you like: paper:tau_bf16=10.1,tau_uint4=3.2"
TextOption = Annotated[
    list[Path] | None,
    typer.Option("--text", help="A text file; may be repeated.", show_default="Python's language reference"),
]
WindowsOption = Annotated[int, typer.Option("--windows", help="Windows of each text.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="The model's type.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="For example cuda or cpu.")]


ReasonerOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter", help="A folder with a PEFT adapter for the model.", show_default="recipes/reasoner/adapter"
    ),
]


def say(line: str, console: Console = notes) -> None:
    """A line with names or paths in it: nothing in it is markup, and it is not folded, so that it can be copied."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """A warning; names and paths in it are no markup."""
    notes.print(f"[bold yellow]Warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _complain(text: str) -> None:
    notes.print(f"[bold red]Error:[/] {escape(text)}", highlight=False, soft_wrap=True)


class InputError(ValueError):
    """An argument that cannot be served."""


#: Errors that say what to do about them.
MENDABLE = (
    CacheFullError,
    ChatTemplateError,
    ConfigError,
    EvaluationError,
    InputError,
    ModelError,
    OSError,  # a full disk, a folder that went away
    TextError,
    UnsupportedModelError,
)


@contextmanager
def clean_exit() -> Iterator[None]:
    """One line instead of a traceback for what a user can mend; exit 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        notes.print("Interrupted; nothing was written.")
        raise typer.Exit(130) from None
    except MENDABLE as error:
        _complain(str(error))
        raise typer.Exit(2) from None
    except torch.OutOfMemoryError as error:
        _complain(str(error).splitlines()[0])
        notes.print(
            "Ask for fewer or shorter sequences or windows, a smaller model, or --dtype bfloat16 instead of float32."
        )
        raise typer.Exit(2) from None


def parse_caches(names: Sequence[str]) -> dict[str, MixKVQConfig]:
    """Configurations by what the user typed, repeats dropped."""
    return {name: MixKVQConfig.parse(name) for name in names}


def progress() -> Progress:
    """A progress bar with times, on standard error; it vanishes when done."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=notes,
        transient=True,
    )


def print_table(table: Table) -> None:
    """Print a table in full where the terminal is too narrow for it: a line that folds can be read, while columns of
    names would vanish.
    """
    needed = Measurement.get(output, output.options.update(max_width=TABLE_WIDTH), table).maximum
    Console(width=max(output.width, needed)).print(table)


def print_json(data: Any) -> None:
    """Results alone on standard output."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
