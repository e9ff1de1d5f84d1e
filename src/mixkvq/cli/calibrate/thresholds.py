"""``mixkvq calibrate thresholds``: what the paper's tiers begin at, for a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.bench.environment import environment
from mixkvq.calibrate.errors import CalibrationError, needed
from mixkvq.calibrate.examiner import Examiner
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.judge import Judge
from mixkvq.calibrate.search import Params, Point, best_within, check_tries, front, search, tpe
from mixkvq.calibrate.thresholds import Thresholds, at_shares, largest_shares, measured_saliences, uint4_share_for
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.calibrate.common import (
    DtypeOption,
    PlotOption,
    SeedOption,
    TrialsOption,
    check_out,
    compare,
    draw_front,
    kept,
    write,
)
from mixkvq.cli.calibrate.exam import BatchOption, DataDirOption, NewTokensOption, about_exam, exam
from mixkvq.cli.calibrate.subject import Subject, load_subject
from mixkvq.cli.common import DeviceOption, JsonOption, ModelOption, TextOption, clean_exit, output, progress
from mixkvq.cli.files import check_files, check_plot, write_json
from mixkvq.cli.loading import check_windows, load_model, parse_dtype, read_windows
from mixkvq.config import MixKVQConfig
from mixkvq.models import DEFAULT_MODEL
from mixkvq.report.fidelity import KL
from mixkvq.report.tables import front_table

#: Windows of each text: quantiles take one pass, a search one for each try.
QUANTILE_WINDOWS, SEARCH_WINDOWS = 4, 1
#: The axes of a front.
CODE_BITS, WRONG = "code bits of a key channel", "wrong answers"
#: What the points of a search are named by.
SHARES = "shares in BF16 and UINT4"


def thresholds(
    out: Annotated[
        Path | None,
        typer.Argument(help="Search, and write the best found to this file. Left out: quantiles alone."),
    ] = None,
    bits: Annotated[float, typer.Option(help="Mean code bits of a key channel; of what is searched, at most.")] = 2.3,
    bf16_share: Annotated[
        float, typer.Option(help="Share of channels to leave in BF16; a search starts there.")
    ] = 0.01,
    tries: Annotated[int, typer.Option(help="Thresholds to try in a search.")] = 30,
    problems: Annotated[
        int | None,
        typer.Option(help="Score a search on so many training problems of GSM8K.", show_default="KL on text"),
    ] = None,
    data_dir: DataDirOption = None,
    batch: BatchOption = 32,
    max_new_tokens: NewTokensOption = None,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: Annotated[
        int | None,
        typer.Option(
            "--windows",
            help="Windows of each text.",
            show_default=f"{QUANTILE_WINDOWS}; {SEARCH_WINDOWS} for a search",
        ),
    ] = None,
    seed: SeedOption = 0,
    trials: TrialsOption = None,
    plot: PlotOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Thresholds of the paper's tiers at which the `paper` cache spends the given bits.

    Quantiles of the model's own saliences; with a file to write, the paper's search over such quantiles.
    """
    with clean_exit(), kept(trials):
        start = {"bf16_share": bf16_share, "uint4_share": uint4_share_for(bits, bf16_share)}
        if out is None:
            check_files([json_file], text)
            _refuse(trials=trials, plot=plot, problems=problems, data_dir=data_dir)
            network, tokenizer = load_model(model, parse_dtype(dtype), device)
            count = QUANTILE_WINDOWS if count is None else count
            ranked = _saliences(network, torch.cat(read_windows(tokenizer, text, window, count)))
            _print_quantiles(at_shares(ranked, **start), model or DEFAULT_MODEL, json_file)
            return
        count = SEARCH_WINDOWS if count is None else count
        check_out(out, trials=trials, text=text, more=[json_file, plot])
        needed("optuna")
        check_plot(plot)
        check_windows(window, count, MixKVQConfig.preset("paper"))
        check_tries(tries)
        scored = exam(problems, data_dir, batch, max_new_tokens)
        subject = load_subject(model, dtype, device, text, window, count)
        network = subject.model
        measured = {**subject.data, **about_exam(scored)}
        journal = Trials(trials, measured)
        ranked = _saliences(network, subject.searched)
        if scored is None:
            yardstick = _by_text(subject, journal)
        else:
            yardstick = _by_answers(scored.examiner(network, subject.tokenizer, model, dtype, journal))
        points = _search(network, ranked, yardstick.score, largest_shares(bits), start, seed, tries)
        best = _best(points, yardstick, bits, plot)
        found = at_shares(ranked, **best.params)
        compared = compare(
            "quantiles",
            subject.judge(journal),
            at_shares(ranked, **start).config(network),
            found.config(network),
            "quantiles",
        )
        write_json(json_file, [{**point.as_dict(), **subject.names, **measured, **environment()} for point in points])
        results = {
            **dataclasses.asdict(found),
            "score": yardstick.loss,
            "front": [point.as_dict() for point in front(points)],
            **compared,
        }
        about = {**subject.names, **measured, "bits": bits, "seed": seed, "tries": tries}
        write(out, subject, Calibration(found.config(network), "thresholds", about, results))


def _print_quantiles(found: Thresholds, model: str, json_file: Path | None) -> None:
    output.print(f"paper:tau_bf16={found.tau_bf16:.4g},tau_uint4={found.tau_uint4:.4g}", soft_wrap=True)
    write_json(json_file, {**dataclasses.asdict(found), "model": model, "bits": found.bits, **environment()})


def _refuse(**searching: Any) -> None:
    """Complain about options that only a search has."""
    for name, given in searching.items():
        if given is not None:
            raise CalibrationError(
                f"--{name.replace('_', '-')} is for a search, which writes a file: give its name, as in mixkvq "
                "calibrate thresholds found.json."
            )


def _saliences(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with progress() as bar:
        task = bar.add_task("reading", total=len(tokens))
        return measured_saliences(model, tokens, lambda: bar.advance(task))


#: Bits and loss of a configuration; thresholds know what they come to on the text that they are quantiles of.
Score = Callable[[MixKVQConfig, Thresholds], tuple[float, float]]


@dataclass(frozen=True)
class Yardstick:
    """What thresholds are compared by.

    Attributes:
        score: bits and loss.
        loss: its name in tables and files.
        axis: its name in pictures.
    """

    score: Score
    loss: str
    axis: str


def _by_text(subject: Subject, journal: Trials) -> Yardstick:
    judge = Judge(subject.model, subject.searched, journal, "searched", keep=True)

    def score(config: MixKVQConfig, _: Thresholds) -> tuple[float, float]:
        row = judge(config)
        return row["key_bits_codes"], row["kl"]

    return Yardstick(score, "KL", KL)


def _by_answers(examiner: Examiner) -> Yardstick:
    return Yardstick(lambda config, found: (found.bits, 1 - examiner(config)), WRONG, WRONG)


def _best(points: list[Point], yardstick: Yardstick, bits: float, plot: Path | None) -> Point:
    """The best of at most so many bits; the front as a table, and all points as a picture."""
    if yardstick.loss == WRONG and all(point.loss == 1 for point in points):
        raise CalibrationError(
            "None of the problems was answered right with any thresholds, which cannot be told apart then. Ask more "
            "problems, allow longer answers (--max-new-tokens), or leave --problems out for KL on text."
        )
    shown = {_name(point): point for point in front(points)}
    output.print(front_table(f"Pareto front of {len(points)} points", SHARES, shown, yardstick.loss, CODE_BITS))
    best = best_within(points, bits)
    draw_front(
        plot,
        {_name(point): (point.bits, point.loss) for point in points},
        CODE_BITS,
        yardstick.axis,
        log_y=yardstick.axis == KL,
        chosen=_name(best),
        limit=bits,
    )
    return best


def _search(
    model: PreTrainedModel,
    ranked: Tensor,
    score: Score,
    largest: dict[str, float],
    start: Params,
    seed: int,
    tries: int,
) -> list[Point]:
    def measure(shares: Params) -> tuple[float, float]:
        found = at_shares(ranked, **shares)
        return score(found.config(model), found)

    sampler = tpe(seed)
    from optuna.distributions import FloatDistribution

    space = {name: FloatDistribution(0, most) for name, most in largest.items()}
    with progress() as bar:
        task = bar.add_task("searching", total=tries)
        return search(sampler, space, measure, tries, first=[start], advance=lambda: bar.advance(task))


def _name(point: Point) -> str:
    return "{bf16_share:.2%}, {uint4_share:.1%}".format(**point.params)
