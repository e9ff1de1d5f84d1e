"""``mixkvq calibrate kvquant``: KVQuant's levels of a model."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from mixkvq.calibrate.file import Calibration
from mixkvq.calibrate.kvquant import check_base, layer_levels
from mixkvq.calibrate.layers import with_layers
from mixkvq.calibrate.trials import Trials
from mixkvq.cli.calibrate.common import DtypeOption, OutArgument, SeedOption, check_out, compare, write
from mixkvq.cli.calibrate.subject import load_subject
from mixkvq.cli.common import CacheHelp, DeviceOption, ModelOption, TextOption, WindowsOption, clean_exit, progress
from mixkvq.cli.loading import check_windows
from mixkvq.config import MixKVQConfig
from mixkvq.evaluate import fidelity as measure


def kvquant(
    out: OutArgument,
    cache: Annotated[str, typer.Option(help=CacheHelp)] = "kvquant-2",
    text: TextOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    count: WindowsOption = 4,
    seed: SeedOption = 0,
    model: ModelOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
) -> None:
    """KVQuant's levels: what codes stand for in each layer, fitted where errors cost most."""
    with clean_exit():
        check_out(out, text=text)
        base = MixKVQConfig.parse(cache)
        check_base(base)
        check_windows(window, count, base)
        subject = load_subject(model, dtype, device, text, window, count, in_turns=False)
        generator = torch.Generator(device=subject.model.device).manual_seed(seed)
        bounds = measure.appends(window, base)
        with progress() as bar:
            task = bar.add_task("gradients", total=len(subject.searched))
            fields = layer_levels(
                subject.model, subject.searched, base, bounds, measure.WARM_UP, generator, lambda: bar.advance(task)
            )
        config = with_layers(base, fields, subject.model)
        about = {"cache": cache, **subject.about, "seed": seed}
        judge = subject.judge(Trials(None, about))
        write(out, subject, Calibration(config, "kvquant", about, compare(cache, judge, base, config)))
