"""``mixkvq eval``: how many answers of a model are right under several caches."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mixkvq.bench.environment import environment
from mixkvq.cli.common import (
    CacheHelp,
    DeviceOption,
    DtypeOption,
    InputError,
    JsonOption,
    ModelOption,
    ReasonerOption,
    clean_exit,
    notes,
    parse_caches,
    print_table,
    progress,
    say,
)
from mixkvq.cli.files import check_writable, write_json
from mixkvq.cli.loading import load_model, parse_dtype, reasoner_adapter, warn_of_other_weights
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.accuracy import Accuracy, accuracies
from mixkvq.evaluate.answers import AnswerFile, Settings
from mixkvq.evaluate.errors import EvaluationError, needed
from mixkvq.evaluate.problems import MAX_CHAIN
from mixkvq.evaluate.runner import Run
from mixkvq.evaluate.tasks import BENCHMARKS, Mathematics, Reasoner, Task
from mixkvq.models import DEFAULT_MODEL, check_adapter, context_length, merge_adapter
from mixkvq.report.tables import accuracy_table

CACHES = ["bf16", "default"]

CachesOption = Annotated[list[str] | None, typer.Option("--cache", help=CacheHelp, show_default=" ".join(CACHES))]
BatchOption = Annotated[int, typer.Option("--batch", help="Answers that are written together.")]
NewTokensOption = Annotated[
    int | None,
    typer.Option("--max-new-tokens", help="Tokens of an answer at most; an answer that is cut off is wrong."),
]
AnswersOption = Annotated[
    Path | None,
    typer.Option("--answers", help="Keep every answer in this file (JSON lines); the same command goes on with it."),
]

evaluation = typer.Typer(help="Measure how many answers are right.", no_args_is_help=True)


@evaluation.callback()
def _group() -> None:
    pass


@evaluation.command()
def reasoner(
    cache: CachesOption = None,
    problems: Annotated[int, typer.Option(help="How many to ask, families in turn.")] = 540,
    families: Annotated[
        str | None, typer.Option(help="Kinds of problems, with commas between them.", show_default="all")
    ] = None,
    longest: Annotated[int, typer.Option(help="Tokens of the longest right chains, about.")] = MAX_CHAIN,
    batch: BatchOption = 32,
    adapter: ReasonerOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    max_new_tokens: NewTokensOption = None,
    answers: AnswersOption = None,
    json_file: JsonOption = None,
) -> None:
    """Generated problems that are solved by long chains of exact steps, by a model that was trained to solve them."""
    with clean_exit(), _resumable(answers):
        names = [name.strip() for name in (families or "").split(",") if name.strip()]
        task = Reasoner(problems, families=names, longest=longest)
        options = Options(cache, batch, model, reasoner_adapter(adapter, model), dtype, device, max_new_tokens, answers)
        _evaluate(task, options, 0, json_file)


def benchmark(
    context: typer.Context,
    cache: CachesOption = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="A folder with the problems as JSON lines.", show_default="the Hugging Face hub"),
    ] = None,
    problems: Annotated[int | None, typer.Option(help="How many to ask.", show_default="all")] = None,
    samples: Annotated[int, typer.Option(help="Answers to each problem; accuracy is their mean.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Sample from so much of the probability.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    batch: BatchOption = 32,
    adapter: Annotated[Path | None, typer.Option(help="A folder with a PEFT adapter for the model.")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    max_new_tokens: NewTokensOption = None,
    answers: AnswersOption = None,
    json_file: JsonOption = None,
) -> None:
    """Ask a public set of problems; the command's name says which."""
    with clean_exit(), _resumable(answers):
        _check_sampling(samples, temperature, top_p)
        sampling: dict[str, Any] = {"samples": samples, "temperature": temperature, "top_p": top_p}
        if adapter is not None:
            check_adapter(adapter)
        task = Mathematics(str(context.info_name), folder=data_dir, count=problems, **sampling)
        options = Options(cache, batch, model, adapter, dtype, device, max_new_tokens, answers)
        _evaluate(task, options, seed, json_file)


for _name, _benchmark in BENCHMARKS.items():
    evaluation.command(_name, help=f"{_benchmark.summary}, answers checked by math-verify.")(benchmark)


@evaluation.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS OF LM_EVAL]...",
)
def harness(context: typer.Context) -> None:
    """Run lm-evaluation-harness with the model `mixkvq`; all options are those of its command `lm_eval`.

    For example: --model_args pretrained=Qwen/Qwen3-8B,cache=default --tasks gsm8k
    """
    with clean_exit():
        needed("lm_eval")
        importlib.import_module("mixkvq.adapters.lm_eval")  # registers the model
        named = any(word in ("--model", "-M") or word.startswith("--model=") for word in context.args)
        before, sys.argv = sys.argv, ["lm_eval", "run", *(() if named else ("--model", "mixkvq")), *context.args]
        try:
            needed("lm_eval.__main__").cli_evaluate()
        finally:
            sys.argv = before


@dataclass(frozen=True)
class Options:
    """What all commands have: as their options are called, with the adapter to merge."""

    cache: Sequence[str] | None
    batch: int
    model: str | None
    adapter: Path | None
    dtype: str
    device: str | None
    max_new_tokens: int | None
    answers: Path | None


def _evaluate(task: Task, options: Options, seed: int, json_file: Path | None) -> None:
    """Load the model, ask, and report."""
    _check(options, json_file)
    configs = parse_caches(options.cache or CACHES)
    file = AnswerFile(options.answers)
    if file.dropped:
        say(f"The last line of {file.path} was not whole (an interrupted write); it is dropped.")
    model, tokenizer = load_model(options.model, parse_dtype(options.dtype), options.device)
    if options.adapter is not None:
        model = merge_adapter(model, options.adapter)
    warn_of_other_weights(model, configs)
    settings = Settings(
        model=options.model or DEFAULT_MODEL,
        adapter=None if options.adapter is None else _fingerprint(options.adapter),
        dtype=options.dtype,
        max_new_tokens=options.max_new_tokens,
        temperature=task.temperature,
        top_p=task.top_p,
        seed=seed,
    )
    run = Run(model, tokenizer, task, settings, batch=options.batch)
    if run.clipped:
        notes.print(
            f"The model's context of {context_length(model):,} leaves {run.clipped:,} of {len(task.questions):,} "
            "questions fewer new tokens than they should have; answers that are cut off there are wrong."
        )
    rows = _rows(run, configs, file)
    questions, samples = rows[0].questions, rows[0].samples
    times = f", {samples} answers to each" if samples > 1 else ""
    print_table(accuracy_table(f"{task.name}: {questions:,} questions{times}", rows))
    about: dict[str, Any] = {"task": task.name, **vars(settings), "batch": options.batch, **environment()}
    write_json(json_file, [{**row.as_dict(), **about} for row in rows])


def _fingerprint(folder: Path) -> str:
    """The folder's name and what tells its weights from others."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("adapter_model*")):
        digest.update(file.read_bytes())
    return f"{folder.resolve().name} {digest.hexdigest()[:12]}"


def _check(options: Options, json_file: Path | None) -> None:
    """Complain before the work about what would fail after it."""
    if options.batch < 1:
        raise InputError(f"--batch {options.batch}: write at least one answer at a time.")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens}: ask for at least one.")
    check_writable(options.answers)
    check_writable(json_file)
    needed("scipy.stats")


def _check_sampling(samples: int, temperature: float, top_p: float) -> None:
    if samples < 1:
        raise InputError(f"--samples {samples}: ask for at least one answer to each problem.")
    if temperature < 0:
        raise InputError(f"--temperature {temperature}: it is 0 or more.")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: it lies above 0, up to 1.")
    if samples > 1 and temperature == 0:
        raise InputError(
            f"--samples {samples} --temperature 0: all answers would be the same. Give a temperature above 0, or one "
            "sample."
        )


def _rows(run: Run, configs: Mapping[str, MixKVQConfig], file: AnswerFile) -> list[Accuracy]:
    """Ask, with a progress bar for each cache, and judge."""
    kept = file.of(run.task, configs, run.settings)
    if kept:
        total = len(run.items) * len(configs)
        say(f"{file.path} has {len(kept):,} of {total:,} answers; the rest is asked for.")
    with progress() as bar:
        bars = {name: bar.add_task(name, total=len(run.items)) for name in configs}
        answers = run.answers(configs, kept, file, lambda name, count: bar.update(bars[name], completed=count))
    return accuracies(answers, configs)


@contextmanager
def _resumable(path: Path | None) -> Iterator[None]:
    """Say how to go on after Ctrl-C, if answers were kept."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if path is None or not path.exists():
            raise
        try:
            count = len(AnswerFile(path).answers)
        except EvaluationError:  # a file of something else, which was not come to yet
            raise interrupt from None
        say(f"Interrupted; {path} holds {count:,} answers. The same command goes on from there.")
        raise typer.Exit(130) from None
