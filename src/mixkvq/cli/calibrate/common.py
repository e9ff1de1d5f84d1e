"""What the ``calibrate`` commands share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixkvq.bench.environment import environment
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.judge import Judge
from mixkvq.cli.common import InputError, check_writable, notes, output, progress
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate import fidelity as measure
from mixkvq.evaluate.texts import windows
from mixkvq.report.fidelity import front_figure
from mixkvq.report.figures import PlotError, check_format, new_figure, save

OutArgument = Annotated[Path, typer.Argument(help="The calibration to write, a JSON file for --cache.")]
TrialsOption = Annotated[
    Path | None, typer.Option("--trials", help="Keep measurements here, and go on from those that are there.")
]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw the Pareto front into this file, .svg or .png.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="The model's type.")]


def check_window(window: int) -> None:
    """Complain about windows of which too little is scored."""
    if window < 2 * measure.WARM_UP:
        raise CalibrationError(
            f"--window {window}: take at least {2 * measure.WARM_UP} tokens, of which the first {measure.WARM_UP} "
            "are not scored."
        )


def check_plot(path: Path | None) -> None:
    """Complain about a picture that could not be drawn before the work, not after it."""
    if path is None:
        return
    check_writable(path)
    try:
        check_format(path)
        new_figure((1, 1))
    except PlotError as error:
        raise InputError(str(error)) from error


def draw_front(path: Path | None, points: Mapping[str, tuple[float, float]], x: str, y: str, *, log_y: bool) -> None:
    """Draw what a search tried, if a picture was asked for."""
    if path is not None:
        save(front_figure(points, x, y, log_y=log_y), path)
        notes.print(f"Wrote {path}")


@contextmanager
def kept(trials: Path | None) -> Iterator[None]:
    """Say what an interruption has left."""
    try:
        yield
    except KeyboardInterrupt:
        if trials is None:
            raise
        notes.print(f"Interrupted; what was measured is in {trials}. The same command goes on from there.")
        raise typer.Exit(130) from None


def searched_and_judged(
    tokenizer: PreTrainedTokenizerBase, text: list[Path] | None, window: int, count: int
) -> tuple[Tensor, Tensor]:
    """``count`` windows ``[N, W]`` to calibrate on, and as many others, on which it is checked what was found.

    In turns, so that both come from all parts of a text; fewer of a short one.

    Raises:
        CalibrationError: there is one window alone.
    """
    tokens = windows(tokenizer, text or [None], window, 2 * count)
    if len(tokens) < 2:
        raise CalibrationError(
            f"The text has one window of {tokens.shape[1]} tokens, and two are needed: what is found on one is checked "
            "on the other. Give a longer text, or a smaller --window."
        )
    return tokens[::2], tokens[1::2]


def held_out(judge: Judge, name: str, config: MixKVQConfig) -> dict[str, float]:
    """What a judge says of a cache, with a progress bar."""
    with progress() as bar:
        task = bar.add_task(f"checking {name}", total=2 * len(judge.windows))
        return judge(config, lambda: bar.advance(task))


def write(out: Path, calibration: Calibration) -> None:
    """Write a calibration with the versions it was made by, and say how to use it."""
    about = {**calibration.about, **environment()}
    Calibration(calibration.config, calibration.kind, about, calibration.results).write(out)
    output.print(f"Wrote {out}; use it with --cache {out}", soft_wrap=True)
