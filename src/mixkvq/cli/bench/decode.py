"""``mixkvq bench decode``: a decode step of a real model, on any machine."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from mixkvq.bench.decode import WARM_UP, bench_decode
from mixkvq.bench.environment import environment
from mixkvq.cli.common import (
    CacheHelp,
    DeviceOption,
    InputError,
    JsonOption,
    ModelOption,
    TextOption,
    clean_exit,
    output,
    parse_caches,
    progress,
)
from mixkvq.cli.files import check_writable, write_json
from mixkvq.cli.loading import load_model, parse_dtype
from mixkvq.evaluate.texts import windows
from mixkvq.models import DEFAULT_MODEL, context_length
from mixkvq.report.tables import decode_table


def decode(
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the cache.", show_default="1024 4096")] = None,
    cache: Annotated[list[str] | None, typer.Option(help=CacheHelp, show_default="default")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="The model's type.", show_default="bfloat16 float32")] = None,
    steps: Annotated[int, typer.Option(help="Timed steps.")] = 20,
    text: TextOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time one decode step against the stock cache, in turn in one run, and count the bytes that are held."""
    with clean_exit():
        check_writable(json_file)
        contexts, configs = sorted(context or [1024, 4096]), parse_caches(cache or ["default"])
        if steps < 1:
            raise InputError(f"--steps {steps}: time at least one.")
        if text is not None and len(text) > 1:
            raise InputError("One --text is enough here: the context is cut from it.")
        rows = []
        for name in dtype or ["bfloat16", "float32"]:
            network, tokenizer = load_model(model, parse_dtype(name), device)
            limit = context_length(network)
            if limit is not None and contexts[-1] > limit:
                raise InputError(f"--context {contexts[-1]} is longer than the model's context of {limit} tokens.")
            if contexts[0] <= steps + WARM_UP:
                raise InputError(f"--context {contexts[0]} is too short to time {steps} steps at its end.")
            longest = windows(tokenizer, text or [None], contexts[-1], 1)[0]
            with progress() as bar:
                task = bar.add_task(name, total=None)

                def note(what: str, bar: Progress = bar, task: TaskID = task) -> None:
                    bar.update(task, description=what)

                for length in contexts:
                    rows += bench_decode(network, longest[:length], configs, steps, advance=note)
        output.print(decode_table(rows))
        about = {"model": model or DEFAULT_MODEL, **environment()}
        write_json(json_file, [{**dataclasses.asdict(row), **about} for row in rows])
