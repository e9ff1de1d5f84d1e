"""``mixkvq calibrate pm-kvq``: PM-KVQ's last width of every layer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mixkvq.calibrate import fingerprint
from mixkvq.calibrate.allocation import SOLVER
from mixkvq.calibrate.errors import CalibrationError, needed
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.layers import packed_memory, quantized_layers, with_layers
from mixkvq.calibrate.pm_kvq import at_width, check_goal, check_stretch, last_widths, sensitivities
from mixkvq.calibrate.smooth import smooth_attention
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.calibrate.common import DtypeOption, OutArgument, TrialsOption, check_out, compare, kept, write
from mixkvq.cli.calibrate.subject import Subject, load_subject
from mixkvq.cli.common import DeviceOption, ModelOption, TextOption, clean_exit, output, progress, say
from mixkvq.cli.files import check_writable
from mixkvq.cli.loading import check_windows
from mixkvq.config import MixKVQConfig

#: Last widths that a layer may have.
WIDTHS = (8, 4, 2)


def pm_kvq(
    out: OutArgument,
    bits: Annotated[
        float | None, typer.Option(help="Mean honest bits of a full cache.", show_default="midway between the widths")
    ] = None,
    widths: Annotated[list[int] | None, typer.Option(help="Last widths of layers; repeat.", show_default="4 2")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a full cache.")] = 32768,
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: Annotated[int, typer.Option("--windows", help="Windows of each text.")] = 8,
    stretch: Annotated[float, typer.Option(help="By how much positions advance with each token.")] = 4.0,
    smooth: Annotated[
        Path | None,
        typer.Option(help="Store keys per token, fold SmoothAttention into the weights, and save the model here."),
    ] = None,
    trials: TrialsOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """PM-KVQ's integer program: which layers end at which width, within the memory of a full cache."""
    with clean_exit(), kept(trials):
        check_out(out, trials=trials, text=text)
        needed(SOLVER)
        check_stretch(stretch)
        _check_smooth(smooth)
        wanted = sorted(widths or (4, 2), reverse=True)
        if len(set(wanted)) < 2 or not set(wanted) <= set(WIDTHS):
            raise CalibrationError(f"--widths takes two or three of {', '.join(map(str, WIDTHS))}; got {wanted}.")
        base = MixKVQConfig.preset("pm-kvq-2", plan_tokens=tokens, key_axis="channel" if smooth is None else "token")
        check_windows(window, count, base)
        subject = load_subject(model, dtype, device, text, window, count, in_turns=False)
        first = subject.searched[0]
        sizes = [packed_memory(subject.model, at_width(base, width), first).bits for width in wanted]
        bits = (min(sizes) + max(sizes)) / 2 if bits is None else bits
        check_goal(bits, wanted, sizes)
        measured = {**subject.data, "config": base.as_dict(), "stretch": stretch, "widths": wanted}
        journal = Trials(trials, measured)  # the configuration says whether the weights are smoothed
        if smooth is not None:
            _smooth(subject, base)
            measured |= {"smooth": smooth.name, "weights": fingerprint.of_weights(subject.model)}
        found = _sensitivities(subject, base, wanted, journal, stretch)
        last = last_widths(found, sizes, wanted, bits)
        fields = {layer: {"key_bits": width, "value_bits": width} for layer, width in last.items()}
        config = with_layers(base, fields, subject.model)
        for width in wanted:
            layers = [str(layer) for layer, b in last.items() if b == width]
            output.print(f"{width} bits in the end: layers {', '.join(layers) or 'none'}", soft_wrap=True)
        full = {"plan_tokens": max(window, base.residual_length)}  # judged as it is when it is full
        compared = compare("pm-kvq-2", subject.judge(journal), base.replace(**full), config.replace(**full))
        if smooth is not None:
            _save(subject, smooth)
            say(f"Saved the model with SmoothAttention to {smooth}: use it with --model {smooth}", output)
        results = {"widths": wanted, "bits": sizes, "sensitivities": found, **compared}
        write(out, subject, Calibration(config, "pm-kvq", {**subject.names, **measured, "bits": bits}, results))


def _check_smooth(folder: Path | None) -> None:
    """Complain about a folder that has something in it, which would be lost."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise CalibrationError(f"--smooth {folder}: give a folder to save the model in, not a file.")
    if folder.is_dir() and any(folder.iterdir()):
        raise CalibrationError(f"--smooth {folder}: this folder is not empty. Give a new one to save the model in.")
    check_writable(folder / "config.json" if folder.is_dir() else folder)


def _save(subject: Subject, folder: Path) -> None:
    """The model and its tokenizer, in a folder that is there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as name:
        whole = Path(name) / folder.name
        for part in (subject.model, subject.tokenizer):
            part.save_pretrained(whole)
        whole.replace(folder)


def _smooth(subject: Subject, base: MixKVQConfig) -> None:
    """Fold SmoothAttention into a model's weights, with a progress bar."""
    with progress() as bar:
        folding = bar.add_task("smoothing", total=len(quantized_layers(subject.model)))
        first = subject.searched[0].to(subject.model.device)
        smooth_attention(subject.model, first, base, lambda: bar.advance(folding))


def _sensitivities(
    subject: Subject, base: MixKVQConfig, widths: list[int], journal: Trials, stretch: float
) -> dict[int, list[float]]:
    """Of each layer at each width, with a progress bar."""
    with progress() as bar:
        task = bar.add_task("gradients", total=len(subject.searched))
        return sensitivities(
            subject.model,
            base,
            subject.searched,
            widths,
            journal,
            stretch=stretch,
            advance=lambda: bar.advance(task),
        )
