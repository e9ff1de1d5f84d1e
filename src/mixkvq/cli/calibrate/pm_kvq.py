"""``mixkvq calibrate pm-kvq``: PM-KVQ's last width of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.layers import quantized_layers, with_layers
from mixkvq.calibrate.pm_kvq import last_widths, sensitivities
from mixkvq.calibrate.smooth import smooth_attention
from mixkvq.cli.calibrate.common import DtypeOption, OutArgument, check_window, write
from mixkvq.cli.common import (
    DeviceOption,
    ModelOption,
    TextOption,
    check_writable,
    clean_exit,
    inputs,
    load_model,
    output,
    parse_dtype,
    progress,
)
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate.texts import windows

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
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """PM-KVQ's integer program: which layers end at which width, within the memory of a full cache."""
    with clean_exit():
        check_writable(out)
        if smooth is not None and smooth.exists() and not smooth.is_dir():
            raise CalibrationError(f"--smooth {smooth}: give a folder to save the model in, not a file.")
        check_window(window)
        wanted = sorted(widths or (4, 2), reverse=True)
        if len(set(wanted)) < 2 or not set(wanted) <= set(WIDTHS):
            raise CalibrationError(f"--widths takes two or three of {', '.join(map(str, WIDTHS))}; got {wanted}.")
        base = MixKVQConfig.preset("pm-kvq-2", plan_tokens=tokens, key_axis="channel" if smooth is None else "token")
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        texts = windows(tokenizer, text or [None], window, count)
        with progress() as bar:
            if smooth is not None:
                folding = bar.add_task("smoothing", total=len(quantized_layers(network)))
                smooth_attention(network, texts[0].to(network.device), base, lambda: bar.advance(folding))
                for part in (network, tokenizer):
                    part.save_pretrained(smooth)
            task = bar.add_task("gradients", total=len(texts))
            found, sizes = sensitivities(
                network, base, texts, wanted, stretch=stretch, advance=lambda: bar.advance(task)
            )
        bits = (min(sizes) + max(sizes)) / 2 if bits is None else bits
        last = last_widths(found, sizes, wanted, bits)
        config = with_layers(base, {layer: {"key_bits": b, "value_bits": b} for layer, b in last.items()}, network)
        about = {
            **inputs(model, text),
            "dtype": dtype,
            "smooth": None if smooth is None else smooth.name,  # the weights that this was found on
            "bits": bits,
            "window": window,
            "windows": count,
            "stretch": stretch,
        }
        if smooth is not None:
            output.print(
                f"Saved the model with SmoothAttention to {smooth}: use it with --model {smooth}", soft_wrap=True
            )
        for width in wanted:
            layers = [str(layer) for layer, b in last.items() if b == width]
            output.print(f"{width} bits in the end: layers {', '.join(layers) or 'none'}", soft_wrap=True)
        write(out, Calibration(config, "pm-kvq", about, {"widths": wanted, "bits": sizes, "sensitivities": found}))
