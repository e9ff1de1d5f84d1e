"""What the commands share: options, loading with a progress line, errors without a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
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
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.adapters.transformers import UnsupportedModelError
from mixkvq.adapters.transformers.support import model_shape
from mixkvq.calibrate.file import read_about
from mixkvq.calibrate.fingerprint import of_weights
from mixkvq.config import ConfigError, MixKVQConfig
from mixkvq.evaluate.chains import ChatTemplateError
from mixkvq.evaluate.errors import EvaluationError
from mixkvq.evaluate.fidelity import WARM_UP
from mixkvq.evaluate.texts import BUILT_IN, TextError, windows
from mixkvq.files import write_whole
from mixkvq.models import DEFAULT_MODEL, ModelError, check_adapter, load
from mixkvq.report.figures import PlotError, check_format, new_figure
from mixkvq.store.books import CacheFullError

#: Results go to standard output, everything else here.
notes = Console(stderr=True)
output = Console()

#: Characters that a table may take in a terminal that has fewer.
TABLE_WIDTH = 120

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="For example cuda or cpu.")]


ReasonerOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter", help="A folder with a PEFT adapter for the model.", show_default="recipes/reasoner/adapter"
    ),
]
#: The adapter that comes with a checkout of the project, and is not installed.
REASONER = Path(__file__).parents[3] / "recipes" / "reasoner" / "adapter"


def say(line: str) -> None:
    """A note with names or paths in it: nothing in it is markup, and it is not folded, so that it can be copied."""
    notes.print(line, markup=False, highlight=False, soft_wrap=True)


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
        notes.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except torch.OutOfMemoryError as error:
        notes.print(f"[bold red]Error:[/] {escape(str(error).splitlines()[0])}", highlight=False, soft_wrap=True)
        notes.print("Ask for fewer or shorter sequences, or a smaller model.")
        raise typer.Exit(2) from None


def parse_caches(names: Sequence[str]) -> dict[str, MixKVQConfig]:
    """Configurations by what the user typed, repeats dropped."""
    return {name: MixKVQConfig.parse(name) for name in names}


def parse_dtype(name: str) -> torch.dtype:
    """A type by name, or an error that lists them."""
    if name not in DTYPES:
        raise InputError(f"There is no type '{name}'. Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_model(
    name: str | None, dtype: torch.dtype, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model while a spinner says so."""
    transformers.utils.logging.set_verbosity_error()
    if name is not None:  # the hub's own progress bars
        say(f"Loading {name} …")
        return load(name, dtype=dtype, device=device)
    # The spinner keeps the real standard error; what libraries write there while loading would tear it apart.
    spinner = Console(file=sys.stderr)
    with spinner.status(f"Loading {DEFAULT_MODEL} …"), contextlib.redirect_stderr(io.StringIO()):
        return load(name, dtype=dtype, device=device)


def warn_of_other_weights(model: PreTrainedModel, caches: Mapping[str, MixKVQConfig]) -> None:
    """Say which calibrations were made on other weights of a model's shape; those of other shapes are refused later.

    Args:
        caches: as :func:`parse_caches` returns them.
    """
    shape, own = model_shape(model.config), None
    strange = []
    for name, config in caches.items():
        about = read_about(name) if config.model == shape else {}
        if about.get("weights") is None:
            continue
        types = {DTYPES.get(about.get("dtype", "")), model.dtype}
        if torch.float16 in types and len(types) > 1:
            continue  # it does not round as bfloat16 does, by which weights are compared
        own = own or of_weights(model)
        if about["weights"] != own:
            strange.append(name)
    if strange:
        notes.print(
            f"[bold yellow]Warning:[/] calibrated on other weights of this shape: {escape(', '.join(strange))}. "
            "Bits may lie where this model does not need them; `mixkvq fidelity` measures what that costs.",
            highlight=False,
            soft_wrap=True,
        )


def check_reasoner(count: int, use: str) -> None:
    """Complain about fewer chains than none; ``use`` is what is done with them."""
    if count < 0:
        raise InputError(f"--reasoner {count}: {use} the chains of at least one problem, or of none.")


def reasoner_adapter(given: Path | None, model: str | None) -> Path | None:
    """The adapter to merge: the one given, the recipe's for the default model, none for another model."""
    if given is None and model is not None:
        return None
    if given is None and not REASONER.exists():
        raise InputError(
            "The default model does not solve these problems without an adapter, and recipes/reasoner/adapter is only "
            "in a checkout of the project. Give a folder with --adapter (recipes/reasoner/train.py makes one), or "
            "another model with --model."
        )
    folder = given or REASONER
    check_adapter(folder)
    return folder


def check_windows(window: int, count: int, base: MixKVQConfig | None = None) -> None:
    """Complain about windows of which too little is scored, or none.

    Args:
        base: a cache that is to read something packed in them.
    """
    packed = 0 if base is None else base.sinks + base.residual_length + 1
    least = max(2 * WARM_UP, packed)
    why = f"the first {WARM_UP} are not scored" if least > packed else "sinks and a block, and a token that reads it"
    if window < least or count < 1:
        raise InputError(
            f"--window {window} --windows {count}: take windows of at least {least} tokens ({why}), and at least one."
        )


def read_windows(
    tokenizer: PreTrainedTokenizerBase, text: Sequence[Path] | None, window: int, count: int
) -> list[Tensor]:
    """Windows ``[N, window]`` of each text, ``count`` or, with a note, as many as a shorter one has."""
    found = []
    for path in text or (None,):
        found.append(windows(tokenizer, [path], window, count))
        if len(found[-1]) < count:
            have = f"{len(found[-1])} windows" if len(found[-1]) > 1 else "one window"
            say(f"'{path or BUILT_IN}' has {have} of {window} tokens, of {count} that were asked for.")
    return found


def inputs(model: str | None, text: Sequence[Path] | None) -> dict[str, Any]:
    """What was read, for results: the model's name and the texts' file names."""
    return {"model": model or DEFAULT_MODEL, "text": [path.name for path in text] if text else [BUILT_IN]}


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


def print_table(table: Table) -> None:
    """Print a table in full where the terminal is too narrow for it: a line that folds can be read, while columns of
    names would vanish.
    """
    needed = Measurement.get(output, output.options.update(max_width=TABLE_WIDTH), table).maximum
    Console(width=max(output.width, needed)).print(table)


def print_json(data: Any) -> None:
    """Results alone on standard output."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
