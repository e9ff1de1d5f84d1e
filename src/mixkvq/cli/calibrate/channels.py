"""``mixkvq calibrate channels``: key channels that are promoted in every block of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from mixkvq.calibrate.channels import frozen_channels, mean_saliences
from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.judge import Judge
from mixkvq.calibrate.layers import with_layers
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.calibrate.common import DtypeOption, OutArgument, check_window, held_out, searched_and_judged, write
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
    output,
    parse_dtype,
    progress,
)
from mixkvq.config import MixKVQConfig
from mixkvq.report.tables import calibration_table


def channels(
    out: OutArgument,
    cache: Annotated[str, typer.Option(help=CacheHelp)] = "default",
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: WindowsOption = 2,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """Freeze which key channels of each head get 4 bits, by their mean salience over a text."""
    with clean_exit():
        check_writable(out)
        base = MixKVQConfig.parse(cache)
        check_window(window)
        network, tokenizer = load_model(model, parse_dtype(dtype), device)
        searched, judged = searched_and_judged(tokenizer, text, window, count)
        with progress() as bar:
            task = bar.add_task("saliences", total=len(searched))
            saliences = mean_saliences(network, searched, base, lambda: bar.advance(task))
        config = with_layers(base, frozen_channels(saliences, base), network)
        about = {"cache": cache, **inputs(model, text), "dtype": dtype, "window": window, "windows": count}
        judge = Judge(network, judged, Trials(None, about), "held out")
        plain, found = held_out(judge, "chosen by block", base), held_out(judge, "frozen", config)
        output.print(calibration_table(cache, plain, found))
        write(out, Calibration(config, "channels", about, {"uniform": plain, "found": found}))
