"""What the ``calibrate`` commands share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor
from transformers import PreTrainedModel

from mixkvq.bench.environment import environment
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.common import notes, output, progress
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate import fidelity as measure

OutArgument = Annotated[Path, typer.Argument(help="The calibration to write, a JSON file for --cache.")]
TrialsOption = Annotated[
    Path | None, typer.Option("--trials", help="Keep measurements here, and go on from those that are there.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="The model's type.")]


def check_window(window: int) -> None:
    """Complain about windows of which too little is scored."""
    if window < 2 * measure.WARM_UP:
        raise CalibrationError(
            f"--window {window}: take at least {2 * measure.WARM_UP} tokens, of which the first {measure.WARM_UP} "
            "are not scored."
        )


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


def held_out(
    model: PreTrainedModel, tokens: Tensor, journal: Trials, name: str, config: MixKVQConfig
) -> dict[str, float]:
    """KL and bits of a cache over windows ``tokens [N, W]`` that were not calibrated on."""

    def read() -> dict[str, float]:
        with progress() as bar:
            task = bar.add_task(f"checking {name}", total=2 * len(tokens))
            row = measure.fidelity(model, tokens, {name: config}, lambda _: bar.advance(task))[0]
        return {"kl": row.kl, "bits": row.bits, "perplexity": row.perplexity}

    return journal.once(f"KL of {hashlib.sha256(config.to_json().encode()).hexdigest()[:16]}", read)


def write(out: Path, calibration: Calibration) -> None:
    """Write a calibration with the versions it was made by, and say how to use it."""
    about = {**calibration.about, **environment()}
    Calibration(calibration.config, calibration.kind, about, calibration.results).write(out)
    output.print(f"Wrote {out}; use it with --cache {out}", soft_wrap=True)
