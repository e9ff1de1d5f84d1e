"""What the ``calibrate`` commands share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixkvq.bench.environment import environment
from mixkvq.calibrate import fingerprint
from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.judge import Judge
from mixkvq.calibrate.trials import check_journal
from mixkvq.cli.common import (
    InputError,
    check_files,
    inputs,
    load_model,
    notes,
    output,
    parse_dtype,
    progress,
    read_windows,
    say,
)
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.fidelity import reference_log_probs
from mixkvq.models import merge_adapter
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
DtypeOption = Annotated[str, typer.Option("--dtype", help="The model's type.")]


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


@dataclass(frozen=True)
class Subject:
    """A model, and what it is calibrated on.

    Attributes:
        model, tokenizer: as loaded, an adapter merged.
        searched: windows ``[N, W]`` to calibrate on.
        judged: others ``[M, W]``, on which it is checked what was found.
        names: of model, text and adapter, for files.
        data: what measurements depend on, whatever it is called, for trials and files.
        started: when the model was loaded, in seconds of :func:`time.monotonic`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    searched: Tensor
    judged: Tensor
    names: dict[str, Any]
    data: dict[str, Any]
    started: float

    @property
    def about(self) -> dict[str, Any]:
        """Both, for files."""
        return {**self.names, **self.data}


def load_subject(
    model: str | None,
    dtype: str,
    device: str | None,
    text: list[Path] | None,
    window: int,
    count: int,
    *,
    in_turns: bool = True,
    adapter: Path | None = None,
) -> Subject:
    """Load a model, and cut a text for it.

    Args:
        count: windows of each text to calibrate on, and as many to judge on; fewer of a short one.
        in_turns: take every other window to judge on, so that both kinds come from all parts of a text; else the last
            ones.
        adapter: to merge into the weights.

    Raises:
        CalibrationError: there is one window alone.
    """
    network, tokenizer = load_model(model, parse_dtype(dtype), device)
    started = time.monotonic()
    texts = read_windows(tokenizer, text, window, 2 * count)
    if max(map(len, texts)) < 2:
        raise CalibrationError(
            f"No text has two windows of {window} tokens: what is found on one is checked on the other. Give a longer "
            "text, or a smaller --window."
        )
    halves = [_in_turns(each) if in_turns else each.tensor_split([(len(each) + 1) // 2]) for each in texts]
    searched, judged = (torch.cat(part) for part in zip(*halves, strict=True))
    if adapter is not None:
        network = merge_adapter(network, adapter)
    _check_numbers(network, searched[0])
    names = {**inputs(model, text), "adapter": None if adapter is None else adapter.name}
    data = {
        "dtype": dtype,
        "window": window,
        "windows": len(searched),
        "weights": fingerprint.of_weights(network),
        "tokens": fingerprint.of_tokens([searched, judged]),
    }
    return Subject(network, tokenizer, searched, judged, names, data, started)


@torch.inference_mode()
def _check_numbers(model: PreTrainedModel, tokens: Tensor) -> None:
    """Complain about a model that does not compute with numbers, as when its type has too small a range."""
    if reference_log_probs(model, tokens.to(model.device)).isnan().any():
        raise CalibrationError(
            f"In {str(model.dtype).removeprefix('torch.')} this model's logits are no numbers: choose another type "
            "with --dtype, such as bfloat16."
        )


def _in_turns(windows: Tensor) -> tuple[Tensor, ...]:
    return windows[::2], windows[1::2]


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
        notes.print(
            f"[bold yellow]Warning:[/] what was found is no better than {escape(cache)} on this text: use that, or "
            "calibrate on more windows of a text that is more like yours.",
            highlight=False,
            soft_wrap=True,
        )
    return {plain: before, "found": after}


def write(out: Path, subject: Subject, calibration: Calibration) -> None:
    """Write a calibration with what it took and the versions it was made by, and say how to use it."""
    took = {"seconds": round(time.monotonic() - subject.started, 1)}
    if subject.model.device.type == "cuda":
        took["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(subject.model.device)
    about = {**calibration.about, **took, **environment()}
    Calibration(calibration.config, calibration.kind, about, calibration.results).write(out)
    output.print(f"Wrote {out}; use it with --cache {out}", markup=False, highlight=False, soft_wrap=True)
