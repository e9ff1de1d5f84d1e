"""What the ``calibrate`` commands share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from mixkvq.bench.environment import environment
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.judge import Judge
from mixkvq.calibrate.trials import check_journal
from mixkvq.cli.calibrate.subject import Subject
from mixkvq.cli.common import InputError, output, progress, say, warn
from mixkvq.cli.files import check_files
from mixkvq.config import MixKVQConfig
from mixkvq.report.fidelity import front_figure
from mixkvq.report.figures import save
from mixkvq.report.tables import calibration_table

OutArgument = Annotated[Path, typer.Argument(help="The calibration to write, a JSON file for --cache.")]
TrialsOption = Annotated[
    Path | None, typer.Option("--trials", help="Keep measurements here, and go on from those that are there.")
]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw the Pareto front into this file, .svg or .png.")]
#: Of what is drawn at random: labels whose gradients are taken, proposals of a search. NumPy takes no larger one.
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Of what is drawn at random.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="The model's type; float32 takes twice the memory of bfloat16.")
]


def check_out(
    out: Path,
    *,
    trials: Path | None = None,
    text: Sequence[Path] | None = None,
    more: Sequence[Path | None] = (),
) -> None:
    """Complain about files that could not be written or used, before the work.

    Args:
        trials: a journal, if one is to be kept.
        text: what is read.
        more: other files to write.
    """
    if out.suffix != ".json":
        raise InputError(f"'{out}': a calibration's name ends in .json, by which --cache knows it from a preset.")
    check_files([out, trials, *more], text)
    check_journal(trials)


def draw_front(
    path: Path | None,
    points: Mapping[str, tuple[float, float]],
    x: str,
    y: str,
    *,
    log_y: bool,
    chosen: str,
    limit: float,
) -> None:
    """Draw what a search tried, if a picture was asked for; arguments as :func:`front_figure` has them."""
    if path is not None:
        save(front_figure(points, x, y, log_y=log_y, chosen=chosen, limit=limit), path)
        say(f"Wrote {path}")


@contextmanager
def kept(trials: Path | None) -> Iterator[None]:
    """Say what an interruption has left."""
    try:
        yield
    except KeyboardInterrupt:
        if trials is None or not trials.exists():
            raise
        say(f"Interrupted; what was measured is in {trials}. The same command goes on from there.")
        raise typer.Exit(130) from None


def held_out(judge: Judge, name: str, config: MixKVQConfig) -> dict[str, float]:
    """What a judge says of a cache, with a progress bar."""
    with progress() as bar:
        task = bar.add_task(f"checking {name}", total=2 * len(judge.windows))
        return judge(config, lambda: bar.advance(task))


def compare(
    cache: str, judge: Judge, base: MixKVQConfig, found: MixKVQConfig, plain: str = "uniform"
) -> dict[str, dict[str, float]]:
    """Print what a calibration is worth on windows that it was not made on, and return it for its file.

    Args:
        cache: the name of ``base``.
        plain: what ``base`` is, in a word.
    """
    before, after = held_out(judge, plain, base), held_out(judge, "what was found", found)
    output.print(calibration_table(cache, before, after))
    if not (after["kl"] < before["kl"] or after["bits"] < before["bits"]):
        warn(
            f"what was found is no better than {cache} on this text: use that, or calibrate on more windows of a text "
            "that is more like yours."
        )
    return {plain: before, "found": after}


def write(out: Path, subject: Subject, calibration: Calibration) -> None:
    """Write a calibration with what it took and the versions it was made by, and say how to use it."""
    took = {"seconds": round(time.monotonic() - subject.started, 1)}
    if subject.model.device.type == "cuda":
        took["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(subject.model.device)
    about = {**calibration.about, **took, **environment()}
    Calibration(calibration.config, calibration.kind, about, calibration.results).write(out)
    say(f"Wrote {out}; use it with --cache {out}", output)
