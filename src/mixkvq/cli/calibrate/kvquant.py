"""``mixkvq calibrate kvquant``: KVQuant's levels of a model."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from mixkvq.calibrate.errors import CalibrationError
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.kvquant import check_base, layer_levels
from mixkvq.calibrate.layers import with_layers
from mixkvq.cli.calibrate.common import DtypeOption, OutArgument, write
from mixkvq.cli.common import (
    CacheHelp,
    DeviceOption,
    ModelOption,
    TextOption,
    WindowsOption,
    check_writable,
    clean_exit,
    inputs,
    load_model,
    parse_dtype,
    progress,
)
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate import fidelity as measure
from mixkvq.evaluate.texts import windows


def kvquant(
    out: OutArgument,
    cache: Annotated[str, typer.Option(help=CacheHelp)] = "kvquant-2",
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: WindowsOption = 4,
    seed: Annotated[int, typer.Option(help="Of the labels whose gradients are taken.")] = 0,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """KVQuant's levels: what codes stand for in each layer, fitted where errors cost most."""
    with clean_exit():
        check_writable(out)
        base = MixKVQConfig.parse(cache)
        check_base(base)
        smallest_window = max(2 * measure.WARM_UP, base.sinks + base.residual_length + 1)
        if window < smallest_window:
            raise CalibrationError(f"--window {window}: take at least {smallest_window} tokens, a block and more.")
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        texts = windows(tokenizer, text or [None], window, count)
        generator = torch.Generator(device=network.device).manual_seed(seed)
        bounds = measure.appends(window, base)
        with progress() as bar:
            task = bar.add_task("gradients", total=len(texts))
            fields = layer_levels(network, texts, base, bounds, measure.WARM_UP, generator, lambda: bar.advance(task))
        config = with_layers(base, fields, network)
        about = {
            "cache": cache,
            **inputs(model, text),
            "dtype": dtype,
            "window": window,
            "windows": count,
            "seed": seed,
        }
        write(out, Calibration(config, "kvquant", about, {}))
