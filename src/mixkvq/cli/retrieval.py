"""``mixkvq retrieval``: whether a model still finds things in a long context."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.bench.environment import environment
from mixkvq.cli.common import (
    CacheHelp,
    DeviceOption,
    InputError,
    JsonOption,
    ModelOption,
    clean_exit,
    parse_caches,
    print_table,
    progress,
    say,
)
from mixkvq.cli.files import check_files, check_plot, write_json
from mixkvq.cli.loading import load_model, parse_dtype, warn_of_other_weights
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate import retrieval as measure
from mixkvq.evaluate.retrieval import KINDS, Cell, Haystack, RetrievalProblem, check_kind, depths, summaries
from mixkvq.evaluate.texts import BUILT_IN
from mixkvq.models import DEFAULT_MODEL, context_length
from mixkvq.report.figures import save
from mixkvq.report.retrieval import heat_map, retrieval_table

CACHES = ["bf16", "default", "kivi-2"]
LENGTHS = [1024, 2048]


def retrieval(
    kind: Annotated[
        list[str] | None,
        typer.Option(help=f"What is hidden: {', '.join(KINDS)}; may be repeated.", show_default="all"),
    ] = None,
    cache: Annotated[list[str] | None, typer.Option(help=CacheHelp, show_default=" ".join(CACHES))] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a prompt and its answer; may be repeated, up to the model's limit.",
            show_default=" ".join(map(str, LENGTHS)),
        ),
    ] = None,
    depth_count: Annotated[
        int, typer.Option("--depths", help="Depths at which to hide things, from the start of the text to its end.")
    ] = 3,
    problems: Annotated[int, typer.Option(help="Problems of each kind, length and depth.")] = 2,
    batch: Annotated[int, typer.Option(help="Problems that are read together.")] = 2,
    text: Annotated[
        Path | None, typer.Option(help="A text file to hide things in.", show_default="Python's language reference")
    ] = None,
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="The model's type; float32 keeps its own rounding out.")] = "float32",
    device: DeviceOption = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a heat map to this file, .svg or .png.")] = None,
) -> None:
    """Hide things in text, and ask for them: does the model find them in a cache?

    Every cache reads every kind, length, depth and problem: without options, about 10 minutes on two idle CPU cores.
    """
    with clean_exit():
        kinds, lengths = list(dict.fromkeys(kind or KINDS)), sorted(set(length or LENGTHS))
        _check(kinds, {"--depths": depth_count, "--problems": problems, "--batch": batch})
        check_files([json_file, plot], [text] if text else None)
        check_plot(plot)
        configs = parse_caches(cache or CACHES)
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        warn_of_other_weights(network, configs)
        limit = context_length(network)
        if limit is not None and lengths[-1] > limit:
            raise InputError(f"--length {lengths[-1]} is longer than the model's context of {limit} tokens.")
        asked = _problems(tokenizer, text, kinds, lengths, depth_count, problems)
        cells = _cells(network, tokenizer, asked, configs, batch)
        name = model or DEFAULT_MODEL
        print_table(retrieval_table(f"Found of what is hidden, {len(asked)} problems", summaries(cells)))
        about = {
            "model": name,
            "dtype": dtype,
            "text": text.name if text else BUILT_IN,
            "batch": batch,
            **environment(),
        }
        write_json(json_file, [{**cell.as_dict(), **about} for cell in cells])
        if plot is not None:
            save(heat_map(cells, f"Found by {name}"), plot)
            say(f"Wrote {plot}")


def _check(kinds: Sequence[str], counts: Mapping[str, int]) -> None:
    """Complain before a model is loaded."""
    for kind in kinds:
        check_kind(kind)
    for option, count in counts.items():
        if count < 1:
            raise InputError(f"{option} {count}: ask for at least one.")


def _problems(
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    kinds: Sequence[str],
    lengths: Sequence[int],
    depth_count: int,
    count: int,
) -> list[RetrievalProblem]:
    """All problems, those of a kind, length and depth next to each other."""
    haystack = Haystack(tokenizer, text)
    cells = list(itertools.product(kinds, lengths, depths(depth_count)))
    with progress() as bar:
        made = bar.track(cells, description="hiding")
        return [problem for cell in made for problem in haystack.problems(*cell, count)]


def _cells(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[RetrievalProblem],
    configs: Mapping[str, MixKVQConfig],
    batch: int,
) -> list[Cell]:
    """Ask, with a progress bar in tokens that are read."""
    with progress() as bar:
        total = len(configs) * sum(problem.length for problem in problems)
        task = bar.add_task("reading", total=total)
        return measure.retrieval(
            model,
            tokenizer,
            problems,
            configs,
            batch=batch,
            advance=lambda name, tokens: bar.update(task, advance=tokens, description=f"asked {name}"),
        )
